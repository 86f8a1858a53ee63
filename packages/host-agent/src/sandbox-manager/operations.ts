/**
 * The operations, each from its first check to its last step. Whoever calls
 * holds the sandbox's queue; `signal` carries the command's deadline.
 */
import { RookeryError } from "@rookery/protocol/errors";
import { failpointNames } from "@rookery/protocol/failpoints";
import type { SnapshotId } from "../ids.ts";
import type { SandboxRecord, SnapshotRecord } from "../journal/records.ts";
import type { VmExit } from "../vmm/vmm.ts";
import { requireDiskReserve, requireMemory } from "./capacity.ts";
import { newEvent, requirePhase, stepTools, undoLimit, type Core, type SandboxEntry } from "./core.ts";
import { createdSteps, createSteps, checkSpecAgainstSource, type CreateContext } from "./create.ts";
import { destroySteps, endSteps } from "./destroy.ts";
import { goOnSteps, holdSteps, isHeld, requireNotHeld, type GoOnReason, type HoldMark } from "./holding.ts";
import { layerIdsOf } from "./disk-layers.ts";
import { newLayerId } from "./new-ids.ts";
import { pauseSteps, retireSteps } from "./pause.ts";
import { resumedSteps, resumeSteps, type ResumeContext } from "./resume.ts";
import type { Lifetime } from "./sandbox.ts";
import {
  finishFork,
  snapshotDoneSteps,
  snapshotPausedSteps,
  snapshotRunningSteps,
  type SnapshotContext,
} from "./snapshot.ts";
import { asRookeryError, runForward, runSteps, type Step } from "./steps.ts";
import { watchVm } from "./watch-vm.ts";
import type { WarmImage } from "./warm-images.ts";

/** The operations by the names that failpoints and logs know them by. */
export const OPERATIONS = {
  create: createSteps,
  created: createdSteps,
  pause: pauseSteps,
  retire: retireSteps,
  resume: resumeSteps,
  resumed: resumedSteps,
  hold: holdSteps,
  "go-on": goOnSteps,
  "snapshot-running": snapshotRunningSteps,
  "snapshot-paused": snapshotPausedSteps,
  "snapshot-done": snapshotDoneSteps,
  destroy: destroySteps,
  end: endSteps,
} as const;

/** Every failpoint of the agent's core. */
export const FAILPOINTS: readonly string[] = failpointNames(OPERATIONS);

export async function create(
  core: Core,
  entry: SandboxEntry,
  source: { warm: WarmImage; snapshot: SnapshotRecord | undefined },
  signal: AbortSignal,
): Promise<void> {
  const { spec } = entry.record;
  checkSpecAgainstSource(spec, source);
  await requireDiskReserve(core);
  const ctx: CreateContext = { core, entry, ...source };
  await timed(core, entry, "create", async (timings) => {
    await undoable(core, "create", createSteps, ctx, timings, signal);
    entry.placed = ctx.placed;
    watchVm(core, entry, ctx.placed!, (exit) => end(core, entry, exit));
  });
  await tryForward(core, entry, "created", createdSteps, ctx);
}

export async function pause(
  core: Core,
  entry: SandboxEntry,
  event: SandboxRecord["pendingEvent"],
  signal: AbortSignal,
): Promise<void> {
  requirePhase(entry, ["running"], "paused");
  await settleFork(core, entry, signal);
  await timed(core, entry, "pause", async (timings) => {
    await undoable(core, "pause", pauseSteps, { core, entry, event }, timings, signal);
    await retire(core, entry, timings);
  });
}

/**
 * A pause, or, where the disk has no room for it, at least a guest that uses no
 * CPU. Gives back which of the two it came to.
 */
export async function pauseOrFreeze(
  core: Core,
  entry: SandboxEntry,
  why: { reason: string; message: string },
  signal: AbortSignal,
): Promise<"paused" | "frozen"> {
  requirePhase(entry, ["running"], "paused");
  if (isHeld(entry.record)) return "frozen";
  const { host, config, clock, logger } = core.deps;
  if ((await host.freeDiskBytes(config.dataDir)) >= config.pauseFloorBytes) {
    try {
      await pause(core, entry, newEvent(core, "paused", why), signal);
      return "paused";
    } catch (cause) {
      // Read anew: the pause was undone, or is further than that.
      if (asRookeryError(cause, signal).code !== "out_of_disk" || entry.record.phase !== "running")
        throw cause;
      logger.warn({ sandboxId: entry.id, err: cause }, "no room for a pause: its guest is only stopped");
    }
  }
  const message = `${why.message}; in memory, since this host's disk is nearly full`;
  await hold(core, entry, {
    mark: { frozen: { sinceMs: clock.nowMs() } },
    event: newEvent(core, "paused", { ...why, message }),
    whateverTheJournalSays: true,
    signal,
  });
  return "frozen";
}

/** The guest stops, and is not let go on until its mark is gone. */
export async function hold(
  core: Core,
  entry: SandboxEntry,
  options: {
    mark: HoldMark;
    event?: SandboxRecord["pendingEvent"];
    whateverTheJournalSays?: boolean;
    signal: AbortSignal;
  },
): Promise<void> {
  requirePhase(entry, ["running"], "frozen");
  const { mark, event, whateverTheJournalSays = false, signal } = options;
  const { frozen, stranger } = entry.record;
  const ctx = { core, entry, mark, event, whateverTheJournalSays, before: { frozen, stranger } };
  await timed(core, entry, "hold", (timings) => undoable(core, "hold", holdSteps, ctx, timings, signal));
}

/** The way back from `hold`: the guest goes on where it was. */
export async function goOn(
  core: Core,
  entry: SandboxEntry,
  why: GoOnReason,
  signal: AbortSignal,
): Promise<void> {
  await timed(core, entry, "go-on", (timings) =>
    undoable(core, "go-on", goOnSteps, { core, entry, why }, timings, signal),
  );
}

/** Ends what a paused sandbox has no more need of; what fails is left to the janitor, since it is paused anyway. */
export async function retire(
  core: Core,
  entry: SandboxEntry,
  timings: Record<string, number> = {},
): Promise<boolean> {
  return await tryForward(core, entry, "retire", retireSteps, { core, entry }, timings);
}

/** Long chains are slow; while it is paused nobody waits for the disk. */
export async function flattenIfDue(core: Core, entry: SandboxEntry, signal: AbortSignal): Promise<void> {
  const { rootDisk } = core.deps;
  if (entry.phase !== "paused" || entry.record.vm !== undefined) return;
  const before = entry.disk!;
  if (!rootDisk.needsFlatten(before)) return;
  await timed(core, entry, "flatten", async () => {
    entry.disk = await rootDisk.flatten(before, signal);
    await core.layers.sweep(layerIdsOf(before.chain));
  });
}

export async function resume(
  core: Core,
  entry: SandboxEntry,
  lifetime: Lifetime | undefined,
  signal: AbortSignal,
): Promise<void> {
  if (isHeld(entry.record)) return await goOn(core, entry, { kind: "resume", lifetime }, signal);
  requirePhase(entry, ["paused"], "resumed");
  if (entry.record.vm !== undefined && !(await retire(core, entry))) {
    throw new RookeryError("host_error", "its former VM could not be taken away yet; try again");
  }
  await settleFork(core, entry, signal);
  requireMemory(core, entry.record.spec.memoryMb);
  entry.isResuming = true;
  try {
    await resumeLetIn(core, entry, lifetime, signal);
  } finally {
    entry.isResuming = false;
  }
}

async function resumeLetIn(
  core: Core,
  entry: SandboxEntry,
  lifetime: Lifetime | undefined,
  signal: AbortSignal,
): Promise<void> {
  await requireDiskReserve(core);
  const warm = await core.deps.warmImages.open(entry.record.warmKey!, signal);
  if (warm === undefined) {
    throw new RookeryError("host_error", "the warm image that this sandbox's memory stands on is gone");
  }
  const ctx: ResumeContext = {
    core,
    entry,
    warm,
    lifetime,
    goBackTo: "paused",
    usedLayer: entry.record.layer!,
  };
  try {
    await timed(core, entry, "resume", async (timings) => {
      await undoable(core, "resume", resumeSteps, ctx, timings, signal);
      entry.placed = ctx.placed;
      watchVm(core, entry, ctx.placed!, (exit) => end(core, entry, exit));
    });
  } catch (cause) {
    if (ctx.goBackTo === "failed") {
      await end(core, entry, { reason: "guest_crashed", message: asRookeryError(cause).message });
    } else if (entry.record.vm !== undefined) {
      await retire(core, entry);
    }
    throw cause;
  }
  await tryForward(core, entry, "resumed", resumedSteps, ctx);
}

export async function snapshot(
  core: Core,
  entry: SandboxEntry,
  options: { snapshotId: SnapshotId; teamId: string },
  signal: AbortSignal,
): Promise<SnapshotRecord> {
  requirePhase(entry, ["running", "paused"], "snapshotted");
  requireNotHeld(entry, "snapshotted before it was resumed");
  await settleFork(core, entry, signal);
  if (entry.phase === "paused" && entry.record.vm !== undefined && !(await retire(core, entry))) {
    throw new RookeryError("host_error", "its former VM could not be taken away yet; try again");
  }
  await requireDiskReserve(core);
  if (entry.disk!.chain.length >= core.deps.config.maxDiskChain) {
    throw new RookeryError(
      "wrong_state",
      "it was snapshotted too often while it ran: pause and resume it first",
      {
        details: { status: entry.phase },
      },
    );
  }
  const layerId = newLayerId(core.deps);
  const ctx: SnapshotContext = { core, entry, ...options, layerId };
  // Until `snapshot.json` is there, or the source's chain has it.
  using _pin = core.layers.pin([layerId]);
  const [name, steps] =
    entry.phase === "running"
      ? (["snapshot-running", snapshotRunningSteps] as const)
      : (["snapshot-paused", snapshotPausedSteps] as const);
  await timed(core, entry, name, async (timings) => {
    try {
      await undoable(core, name, steps, ctx, timings, signal);
    } finally {
      entry.unfinished ||= entry.record.fork?.switching === true;
    }
  });
  await tryForward(core, entry, "snapshot-done", snapshotDoneSteps, ctx);
  return ctx.record!;
}

export async function destroy(core: Core, entry: SandboxEntry): Promise<void> {
  // There is no way back from here: what fails is gone on with by the janitor.
  entry.unfinished = true;
  entry.set({ phase: "stopping" });
  await timed(core, entry, "destroy", async (timings) => {
    using limit = undoLimit(core);
    await runForward(destroySteps, { core, entry }, { ...stepTools(core, "destroy"), timings }, limit.signal);
  });
  entry.unfinished = false;
}

/** The VM ended, or cannot be had back: the sandbox has failed. Keeps the record until it is destroyed. */
export async function end(
  core: Core,
  entry: SandboxEntry,
  exit: { reason: VmExit["reason"] | "ended_unseen" | "host_restarted" | "host_error"; message: string },
): Promise<void> {
  entry.set({
    phase: "failed",
    exit: { code: exit.reason, message: exit.message },
    pendingEvent: newEvent(core, "failed", exit),
  });
  core.deps.logger.warn({ sandboxId: entry.id, exit }, "sandbox failed");
  await tryForward(core, entry, "end", endSteps, { core, entry });
}

/** Runs what is left of `end`. */
export async function endAgain(core: Core, entry: SandboxEntry): Promise<void> {
  await tryForward(core, entry, "end", endSteps, { core, entry });
}

/** A fork whose undo failed is carried through before anything else is done with the disk. */
export async function settleFork(core: Core, entry: SandboxEntry, signal: AbortSignal): Promise<void> {
  const { fork } = entry.record;
  if (fork === undefined) return;
  await finishFork(core, entry, signal);
  if (!core.snapshots.has(fork.snapshotId)) await core.journal.removeSnapshotDir(fork.snapshotId);
}

async function undoable<C>(
  core: Core,
  operation: string,
  steps: readonly Step<C>[],
  ctx: C,
  timings: Record<string, number>,
  signal: AbortSignal,
): Promise<void> {
  await runSteps(
    steps,
    ctx,
    { ...stepTools(core, operation), timings },
    { signal, undoSignal: () => undoLimit(core) },
  );
}

/** For steps after the commit point: their failure changes nothing for the caller; the janitor goes on with them. */
async function tryForward<C>(
  core: Core,
  entry: SandboxEntry,
  operation: string,
  steps: readonly Step<C>[],
  ctx: C,
  timings: Record<string, number> = {},
): Promise<boolean> {
  using limit = undoLimit(core);
  try {
    await runForward(steps, ctx, { ...stepTools(core, operation), timings }, limit.signal);
    entry.unfinished = false;
    return true;
  } catch (cause) {
    entry.unfinished = true;
    core.deps.logger.error({ sandboxId: entry.id, operation, err: cause }, "to be gone on with later");
    return false;
  }
}

async function timed(
  core: Core,
  entry: SandboxEntry,
  operation: string,
  work: (timings: Record<string, number>) => Promise<void>,
): Promise<void> {
  const { clock, logger } = core.deps;
  const begin = clock.monotonicMs();
  const timings: Record<string, number> = {};
  const facts = () => ({
    sandboxId: entry.id,
    operation,
    generation: entry.record.generation.toString(),
    ms: Math.round(clock.monotonicMs() - begin),
    steps: timings,
  });
  try {
    await work(timings);
    logger.info(facts(), "operation done");
  } catch (cause) {
    logger.warn({ ...facts(), err: cause }, "operation failed");
    throw cause;
  }
}
