/**
 * Operations as lists of steps with an undo.
 *
 * A step's undo must bear running twice, and after a half-done run: recovery
 * after a crash takes the same path. What cannot be taken back any more (the
 * journal says "paused", the guest is dead) is a list of steps without undo,
 * each of which bears repetition.
 */
import { RookeryError } from "@rookery/protocol/errors";
import type { Failpoints } from "@rookery/protocol/failpoints";
import { comesFromFullDisk } from "../host/errno.ts";
import type { Clock } from "./clock.ts";
import type { Logger } from "./deps.ts";

export interface Step<C> {
  name: string;
  run(ctx: C, signal: AbortSignal): Promise<void>;
  undo?(ctx: C, signal: AbortSignal): Promise<void>;
}

export interface StepTools {
  /** Name of the operation: `create`, `pause`, … */
  operation: string;
  failpoints: Failpoints;
  clock: Clock;
  logger: Logger;
  /** Milliseconds of each step are added here, under its name. */
  timings: Record<string, number>;
}

/** The first error, and what the undo could not do. Its code is the first error's. */
export class IncompleteUndo extends RookeryError {
  readonly failures: readonly { step: string; cause: unknown }[];

  constructor(first: RookeryError, failures: readonly { step: string; cause: unknown }[]) {
    const left = failures.map(({ step }) => step).join(", ");
    super(first.code, `${first.message} (and could not undo: ${left})`, {
      cause: new AggregateError([first, ...failures.map(({ cause }) => cause)], "operation and undo failed"),
      details: first.details,
    });
    this.failures = failures;
  }
}

/** Runs the steps; on failure undoes those begun, last first, within the time that `undoSignal` gives. */
export async function runSteps<C>(
  steps: readonly Step<C>[],
  ctx: C,
  tools: StepTools,
  options: { signal: AbortSignal; undoSignal: () => { signal: AbortSignal } & Disposable },
): Promise<void> {
  const begun: Step<C>[] = [];
  try {
    for (const step of steps) {
      options.signal.throwIfAborted();
      begun.unshift(step);
      await runStep(step, ctx, tools, options.signal);
    }
  } catch (cause) {
    const first = asRookeryError(cause, options.signal);
    using undo = options.undoSignal();
    const failures = await undoSteps(begun, ctx, tools, undo.signal);
    throw failures.length === 0 ? first : new IncompleteUndo(first, failures);
  }
}

/** Goes on past failures and gives them back. `steps` are in the order to undo them. */
export async function undoSteps<C>(
  steps: readonly Step<C>[],
  ctx: C,
  tools: StepTools,
  signal: AbortSignal,
): Promise<{ step: string; cause: unknown }[]> {
  const failures: { step: string; cause: unknown }[] = [];
  for (const step of steps) {
    try {
      await step.undo?.(ctx, signal);
    } catch (cause) {
      tools.logger.error(
        { operation: tools.operation, step: step.name, err: cause },
        "a step was not undone",
      );
      failures.push({ step: step.name, cause });
    }
  }
  return failures;
}

/** Runs steps that are never undone; stops at the first failure, to be run again later from the start. */
export async function runForward<C>(
  steps: readonly Step<C>[],
  ctx: C,
  tools: StepTools,
  signal: AbortSignal,
): Promise<void> {
  for (const step of steps) {
    try {
      await runStep(step, ctx, tools, signal);
    } catch (cause) {
      throw asRookeryError(cause, signal);
    }
  }
}

async function runStep<C>(step: Step<C>, ctx: C, tools: StepTools, signal: AbortSignal): Promise<void> {
  const begin = tools.clock.monotonicMs();
  await tools.failpoints.reach(`${tools.operation}.${step.name}.before`);
  await step.run(ctx, signal);
  await tools.failpoints.reach(`${tools.operation}.${step.name}.after`);
  tools.timings[step.name] = Math.round((tools.clock.monotonicMs() - begin) * 10) / 10;
}

/** Errors of Node and of programs that we ran, in the words of our table. Their own words go to the log. */
export function asRookeryError(cause: unknown, signal?: AbortSignal): RookeryError {
  if (cause instanceof RookeryError) return cause;
  if (signal?.aborted === true && signal.reason instanceof RookeryError) return signal.reason;
  if (comesFromFullDisk(cause)) {
    return new RookeryError("out_of_disk", "this host's disk is full", { cause });
  }
  return new RookeryError("host_error", "this host could not do that; its log says why", { cause });
}
