/**
 * What the agent does by itself: the reaper (expired sandboxes), the hang watch
 * (VMMs that stopped answering) and the janitor (what did not get through).
 *
 * All three only look, and put work into the sandbox's queue, where it is
 * decided again: what was true at the look may have changed.
 */
import pLimit from "p-limit";
import type { Core, SandboxEntry } from "./core.ts";
import { newEvent, reportPendingEvent, persist } from "./core.ts";
import { isExpired } from "./expiry.ts";
import { isHeld, stopGuest } from "./holding.ts";
import { destroy, end, endAgain, flattenIfDue, pause, retire, settleFork } from "./operations.ts";
import { dropOtherLayers } from "./pause.ts";
import { settle } from "./settle.ts";

/** After an expiry that failed. */
const EXPIRY_RETRY_MS = 15_000;
const PINGS_AT_ONCE = 8;
const MIB = 1 << 20;

export interface Watches {
  /** Ends the timers; what they began goes on. */
  stop(): void;
}

export function startWatches(core: Core): Watches {
  const { config } = core.deps;
  const timers = [
    repeat(core, config.reaperIntervalMs, () => Promise.resolve(reap(core))),
    repeat(core, config.retryIntervalMs, () => tidy(core)),
  ];
  if (config.hang.intervalMs > 0) timers.push(repeat(core, config.hang.intervalMs, () => checkHangs(core)));
  return { stop: () => timers.forEach((timer) => timer[Symbol.dispose]()) };
}

/** The next round begins an interval after the last one has ended. */
function repeat(core: Core, intervalMs: number, round: () => Promise<void>): Disposable {
  let stopped = false;
  let timer: Disposable | undefined;
  const again = () => {
    if (!stopped) timer = core.deps.clock.after(intervalMs, () => void run());
  };
  const run = async () => {
    try {
      await round();
    } catch (cause) {
      core.deps.logger.error({ err: cause }, "a watch failed");
    }
    again();
  };
  again();
  return {
    [Symbol.dispose]: () => {
      stopped = true;
      timer?.[Symbol.dispose]();
    },
  };
}

export function reap(core: Core): void {
  const nowMs = core.deps.clock.nowMs();
  for (const entry of core.sandboxes.values()) {
    // What is being worked on is looked at again in the next round.
    if (entry.queue.length > 0 || entry.expireNotBeforeMs > nowMs || !isExpired(entry, nowMs)) continue;
    void own(core, entry, "expire", async (signal) => {
      if (!isExpired(entry, core.deps.clock.nowMs())) return;
      entry.expireNotBeforeMs = core.deps.clock.nowMs() + EXPIRY_RETRY_MS;
      const why = { reason: "expired", message: "its time was over" };
      if (entry.record.spec.lifetime.onTimeout === "pause") {
        await pause(core, entry, newEvent(core, "paused", why), signal);
        flattenLater(core, entry);
      } else {
        entry.set({ pendingEvent: newEvent(core, "stopped", why) });
        await destroy(core, entry);
      }
    });
  }
}

export async function checkHangs(core: Core): Promise<void> {
  const { clock, config } = core.deps;
  const atOnce = pLimit(PINGS_AT_ONCE);
  const checks = [...core.sandboxes.values()].map((entry) =>
    atOnce(async () => {
      const { placed } = entry;
      if (entry.phase !== "running" || placed === undefined || entry.queue.length > 0) return;
      const controller = new AbortController();
      using _timer = clock.after(config.hang.timeoutMs, () => controller.abort(new Error("no answer")));
      try {
        await placed.vm.ping(controller.signal);
        entry.hangMisses = 0;
      } catch (cause) {
        entry.hangMisses += 1;
        core.deps.logger.warn(
          { sandboxId: entry.id, misses: entry.hangMisses, err: cause },
          "VMM does not answer",
        );
      }
      if (entry.hangMisses < config.hang.misses) return;
      await own(core, entry, "hang", async () => {
        if (entry.phase !== "running" || entry.placed !== placed || placed.vm.state === "exited") return;
        await end(core, entry, { reason: "hung", message: "its virtual machine stopped answering" });
      });
    }),
  );
  await Promise.all(checks);
}

/** Goes on with what did not get through before. */
export async function tidy(core: Core): Promise<void> {
  await core.pool.places.retryLeaving();
  for (const entry of core.sandboxes.values()) {
    if (entry.queue.length > 0) continue;
    if (await hasRoomNow(core, entry)) {
      await own(core, entry, "pause at last", (signal) => pauseFrozen(core, entry, signal));
      continue;
    }
    const wrongStates = isHeld(entry.record) ? ["running", "exited"] : ["frozen", "exited"];
    const isStuck = entry.phase === "running" && wrongStates.includes(entry.placed?.vm.state ?? "");
    if (!entry.unfinished && !entry.unsettled && !isStuck) continue;
    await own(core, entry, "tidy", (signal) => tidyOne(core, entry, signal));
  }
}

/** It was frozen for want of room, and there is some now, also for those that come to be. */
async function hasRoomNow(core: Core, { record }: SandboxEntry): Promise<boolean> {
  if (!isHeld(record) || record.stranger !== undefined) return false;
  const { host, config } = core.deps;
  const neededBytes = config.diskReserveBytes + record.spec.memoryMb * MIB;
  return (await host.freeDiskBytes(config.dataDir)) >= neededBytes;
}

/** The control plane takes it for paused already. */
async function pauseFrozen(core: Core, entry: SandboxEntry, signal: AbortSignal): Promise<void> {
  if (!isHeld(entry.record) || entry.record.stranger !== undefined) return;
  await pause(core, entry, undefined, signal);
  flattenLater(core, entry);
}

async function tidyOne(core: Core, entry: SandboxEntry, signal: AbortSignal): Promise<void> {
  if (entry.unsettled) return await settle(core, entry);
  switch (entry.phase) {
    case "stopping":
      return await destroy(core, entry);
    case "failed":
      return await endAgain(core, entry);
    case "paused":
      await settleFork(core, entry, signal);
      await retire(core, entry);
      return;
    case "running": {
      const vm = entry.placed!.vm;
      if (vm.state === "exited") return await end(core, entry, await vm.exited);
      await settleFork(core, entry, signal);
      if (isHeld(entry.record)) await stopGuest(entry, signal);
      else if (vm.state === "frozen") await vm.unfreeze(signal);
      await dropOtherLayers(core, entry);
      await core.pool.dropOwnDisk(entry.placed!);
      await reportPendingEvent(core, entry);
      await persist(core, entry, { durable: false });
      entry.unfinished = false;
      return;
    }
    default: // starting, pausing, resuming: an operation is at work, or recovery will be
      return;
  }
}

/** In the sandbox's queue: a resume waits for it, the pause does not. */
export function flattenLater(core: Core, entry: SandboxEntry): void {
  if (entry.disk === undefined || !core.deps.rootDisk.needsFlatten(entry.disk)) return;
  void own(core, entry, "flatten", (signal) => flattenIfDue(core, entry, signal));
}

/** The agent's own work on a sandbox. Its failure is logged and left to the next round. */
export async function own(
  core: Core,
  entry: SandboxEntry,
  what: string,
  work: (signal: AbortSignal) => Promise<void>,
): Promise<void> {
  try {
    await entry.queue.runOwn(async () => {
      if (core.sandboxes.get(entry.id) !== entry) return;
      const signal = AbortSignal.timeout(core.deps.config.ownWorkTimeoutMs);
      await core.workLimit.run(() => work(signal), signal);
    });
  } catch (cause) {
    core.deps.logger.error({ sandboxId: entry.id, what, err: cause }, "the agent's own work failed");
  }
}
