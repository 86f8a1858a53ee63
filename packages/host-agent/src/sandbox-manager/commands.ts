/**
 * Commands on one sandbox: one after the other, each under its deadline, and
 * none twice. The highest generation is remembered; a lower one is refused, the
 * same one joins the command under way or gets its answer.
 */
import { RookeryError } from "@rookery/protocol/errors";
import type { OperationKind, Outcome } from "../journal/records.ts";
import { deadlineSignal } from "./clock.ts";
import { persist, type Core, type SandboxEntry } from "./core.ts";
import type { Operation, SandboxView } from "./sandbox.ts";
import { endRevival } from "./revive-guest.ts";
import { asRookeryError } from "./steps.ts";
import { viewOfSandbox } from "./views.ts";

/** Work under its limit; what may wait for minutes (a warm image being built) is done outside. */
export type AtWork = <T>(work: () => Promise<T>) => Promise<T>;

/** The answer to a command that was given before; undefined for a new one. */
export function repetitionOf(
  core: Core,
  entry: SandboxEntry,
  kind: OperationKind,
  operation: Operation,
): Promise<SandboxView> | undefined {
  const { generation, last } = entry.record;
  if (operation.generation > generation) return undefined;
  if (operation.generation < generation) return Promise.reject(staleGeneration());
  // A snapshot leaves the source's state alone: its own id tells repetitions.
  if (kind === "snapshot" || last?.generation !== generation) return undefined;
  const { underWay } = entry;
  if (underWay?.kind === kind && underWay.generation === generation) return underWay.promise;
  if (kind === "destroy") return undefined; // as long as it is here, destroying it is to be done
  if (last.kind !== kind) return Promise.reject(staleGeneration());
  if (last.error !== undefined) return Promise.reject(new RookeryError(last.error.code, last.error.message));
  return viewOfSandbox(core, entry);
}

/** Queues a command, runs it under its deadline and the work limit, and remembers how it ended. */
export async function runCommand(
  core: Core,
  entry: SandboxEntry,
  kind: OperationKind,
  operation: Operation,
  work: (signal: AbortSignal, atWork: AtWork) => Promise<void>,
  onFailure?: (error: RookeryError) => Promise<void>,
): Promise<SandboxView> {
  const { clock } = core.deps;
  const { generation } = operation;
  entry.queue.requireRoom();
  void endRevival(entry);
  const abort = new AbortController();
  const queued = entry.queue.run(async () => {
    if (core.sandboxes.get(entry.id) !== entry) {
      if (kind === "destroy") return await viewOfSandbox(core, entry);
      throw notFound();
    }
    using limit = deadlineSignal(
      clock,
      operation.deadlineUnixMs - clock.nowMs(),
      () => new RookeryError("timeout", `the ${kind} was not done in time`),
      [abort.signal],
    );
    const { signal } = limit;
    try {
      signal.throwIfAborted();
      if (generation < entry.record.generation) throw staleGeneration();
      await work(signal, (atWork) => core.workLimit.run(atWork, signal));
    } catch (cause) {
      const error = asRookeryError(cause, signal);
      await onFailure?.(error);
      if (!(cause instanceof RookeryError))
        core.deps.logger.error({ err: cause, kind }, "unexpected failure");
      await recordFailure(core, entry, {
        kind,
        generation,
        error: { code: error.code, message: error.message },
      });
      throw error;
    }
    return await viewOfSandbox(core, entry);
  });
  entry.set({ generation, ...(kind !== "snapshot" && { last: { kind, generation } }) });
  const underWay = { kind, generation, promise: queued, abort };
  entry.underWay = underWay;
  try {
    return await queued;
  } finally {
    if (entry.underWay === underWay) entry.underWay = undefined;
  }
}

/** So that a repetition of the command is answered, and an older one refused, also after a restart of the agent. */
async function recordFailure(core: Core, entry: SandboxEntry, outcome: Outcome): Promise<void> {
  if (core.sandboxes.get(entry.id) !== entry) return;
  const { generation, last } = entry.record;
  if (generation !== outcome.generation) return; // a later command came
  if (last?.generation === generation && last.kind === outcome.kind) entry.set({ last: outcome });
  try {
    await persist(core, entry, { durable: false });
  } catch (cause) {
    core.deps.logger.error({ sandboxId: entry.id, err: cause }, "a failure was not written down");
  }
}

export function notFound(): RookeryError {
  return new RookeryError("not_found", "there is no such sandbox here");
}

export function staleGeneration(): RookeryError {
  return new RookeryError("stale_generation", "a newer command for this sandbox was accepted before");
}
