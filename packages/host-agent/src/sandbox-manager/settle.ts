/**
 * Settling one sandbox after the agent died: its record says what was meant,
 * the host what is. Half-done operations are finished or undone, by phase.
 *
 * It bears repetition: each line is again a journaled step of an operation.
 */
import { persist, undoLimit, stepTools, type Core, type SandboxEntry } from "./core.ts";
import { reportPendingEvent } from "./core.ts";
import { isHeld, stopGuest } from "./holding.ts";
import { destroy, end, endAgain, retire, settleFork } from "./operations.ts";
import { dropOtherLayers } from "./pause.ts";
import { isLayerStillGood, journalRunning, resumeSteps, type ResumeContext } from "./resume.ts";
import { startGuest } from "./start-guest.ts";
import { undoSteps } from "./steps.ts";
import type { PlacedVm } from "../vm-pool/vm-pool.ts";
import { watchVm } from "./watch-vm.ts";

export async function settle(core: Core, entry: SandboxEntry): Promise<void> {
  entry.unsettled = true;
  using limit = undoLimit(core);
  await settlePhase(core, entry, limit.signal);
  entry.unsettled = false;
}

async function settlePhase(core: Core, entry: SandboxEntry, signal: AbortSignal): Promise<void> {
  switch (entry.phase) {
    case "starting":
      failLast(entry, "create");
      await releaseVm(core, entry);
      return await destroy(core, entry);
    case "stopping":
      await releaseVm(core, entry);
      return await destroy(core, entry);
    case "failed":
      await releaseVm(core, entry);
      if (entry.record.vm !== undefined || entry.record.pendingEvent !== undefined)
        await endAgain(core, entry);
      return;
    case "running":
      return await settleRunning(core, entry, signal);
    case "pausing":
      return await settlePausing(core, entry, signal);
    case "paused":
      return await settlePaused(core, entry, signal);
    case "resuming":
      return await settleResuming(core, entry, signal);
  }
}

async function settleRunning(core: Core, entry: SandboxEntry, signal: AbortSignal): Promise<void> {
  const placed = await adopt(core, entry, signal);
  if (placed === undefined) return await endGone(core, entry);
  entry.placed = placed;
  await settleFork(core, entry, signal);
  if (isHeld(entry.record)) await stopGuest(entry, signal);
  else if (placed.vm.state === "frozen") await placed.vm.unfreeze(signal);
  await dropOtherLayers(core, entry); // of a resume that had just got through
  await reportPendingEvent(core, entry);
  await persist(core, entry, { durable: false });
  watchVm(core, entry, placed, (exit) => end(core, entry, exit));
}

/** The pause was not committed: the guest goes on. */
async function settlePausing(core: Core, entry: SandboxEntry, signal: AbortSignal): Promise<void> {
  failLast(entry, "pause");
  entry.set({ layer: undefined, pendingEvent: undefined });
  await dropOtherLayers(core, entry);
  entry.set({ phase: "running" });
  await settleRunning(core, entry, signal);
}

async function settlePaused(core: Core, entry: SandboxEntry, signal: AbortSignal): Promise<void> {
  if (entry.record.vm !== undefined) {
    const placed = await adopt(core, entry, signal);
    // Its pause was being taken back when the agent died, after the guest went on.
    if (placed?.vm.state === "running") return await settlePausing(core, entry, signal);
    await placed?.vm.kill();
    await releaseVm(core, entry);
  }
  await settleFork(core, entry, signal);
  if (!(await retire(core, entry))) throw new Error(`${entry.id}: what its former VM held is still there`);
}

/** See the head of resume.ts. */
async function settleResuming(core: Core, entry: SandboxEntry, signal: AbortSignal): Promise<void> {
  const placed = await adopt(core, entry, signal);
  const sameBoot = entry.record.bootId === core.deps.host.bootId;
  const { thawing } = entry.record;
  const hasRun = thawing !== undefined && (!sameBoot || !(await isLayerStillGood(entry)));
  const goesOn =
    placed !== undefined && (placed.vm.state === "running" || (placed.vm.state === "frozen" && hasRun));
  if (goesOn) return await goOnResuming(core, entry, placed, signal);
  // No guest runs, so what the mark says now is final.
  await placed?.vm.kill();
  await releaseVm(core, entry);
  if (thawing !== undefined && (!sameBoot || !(await isLayerStillGood(entry)))) {
    return await endGone(core, entry);
  }
  failLast(entry, "resume");
  entry.set({ phase: "paused", thawing: undefined });
  await persist(core, entry, { durable: true });
  await settlePaused(core, entry, signal);
}

async function goOnResuming(
  core: Core,
  entry: SandboxEntry,
  placed: PlacedVm,
  signal: AbortSignal,
): Promise<void> {
  try {
    if (placed.vm.state === "frozen") await placed.vm.unfreeze(signal);
    await startGuest(core, entry, placed, { growRootFs: false }, signal);
    await journalRunning(core, entry, undefined);
  } catch (cause) {
    core.deps.logger.warn(
      { sandboxId: entry.id, err: cause },
      "a resume could not be finished: pausing it again",
    );
    const usedLayer = entry.record.layer!;
    const ctx: ResumeContext = {
      core,
      entry,
      placed,
      usedLayer,
      lifetime: undefined,
      goBackTo: "paused",
      warm: undefined,
    };
    using limit = undoLimit(core);
    await undoSteps(resumeSteps.toReversed(), ctx, stepTools(core, "resume"), limit.signal);
    entry.placed = undefined; // undone with the rest
    failLast(entry, "resume");
    if (ctx.goBackTo === "failed") return await endGone(core, entry);
    await retire(core, entry);
    return;
  }
  await settleRunning(core, entry, signal);
}

async function adopt(core: Core, entry: SandboxEntry, signal: AbortSignal): Promise<PlacedVm | undefined> {
  if (entry.placed !== undefined && entry.placed.vm.state !== "exited") return entry.placed;
  const record = entry.record.vm && core.formerVms.get(entry.record.vm.vmId);
  const placed = record && (await core.pool.adopt(record, signal));
  if (placed === undefined || placed.vm.state === "exited") return undefined;
  // Once and for all: a VMM answers one client, and a second adoption would wait for the first.
  entry.placed = placed;
  return placed;
}

/** Ends what may be left of a VM that no sandbox needs any more. */
async function releaseVm(core: Core, entry: SandboxEntry): Promise<void> {
  const { vm } = entry.record;
  if (vm === undefined) return;
  entry.placed = undefined;
  const record = core.formerVms.get(vm.vmId);
  if (record === undefined) return;
  await core.pool.places.release(record, {});
  core.formerVms.delete(vm.vmId);
}

/** Its VM is gone, and nothing can bring it back. */
async function endGone(core: Core, entry: SandboxEntry): Promise<void> {
  const sameBoot = entry.record.bootId === core.deps.host.bootId;
  await releaseVm(core, entry);
  await end(
    core,
    entry,
    sameBoot
      ? { reason: "ended_unseen", message: "its virtual machine ended while the agent was away" }
      : { reason: "host_restarted", message: "the host was restarted" },
  );
}

/** Whoever repeats the command that was cut off learns that it was not done. */
function failLast(entry: SandboxEntry, kind: "create" | "pause" | "resume"): void {
  const { last } = entry.record;
  if (last?.kind !== kind) return;
  const error = { code: "host_error" as const, message: `the agent was restarted during the ${kind}` };
  entry.set({ last: { ...last, error } });
}
