/**
 * What is done to many sandboxes at once: within the work limit, and past
 * failures, which are given back.
 */
import type { RookeryError } from "@rookery/protocol/errors";
import type { SandboxId } from "../ids.ts";
import type { Core, SandboxEntry } from "./core.ts";
import { isHeld } from "./holding.ts";
import { pauseOrFreeze } from "./operations.ts";
import { endRevival } from "./revive-guest.ts";
import { asRookeryError } from "./steps.ts";

export type Failures = { id: SandboxId; error: RookeryError }[];

export interface PausedAll {
  paused: SandboxId[];
  /** Stopped in memory, for want of room. */
  frozen: SandboxId[];
  failures: Failures;
}

export async function pauseAll(core: Core, why: { reason: string; message: string }): Promise<PausedAll> {
  const done: PausedAll = { paused: [], frozen: [], failures: [] };
  done.failures = await forAll(
    core,
    ({ phase, record }) => phase === "running" && !isHeld(record),
    async (entry, signal) => {
      if (entry.phase !== "running" || isHeld(entry.record)) return;
      done[await pauseOrFreeze(core, entry, why, signal)].push(entry.id);
    },
  );
  return done;
}

export async function forAll(
  core: Core,
  which: (entry: SandboxEntry) => boolean,
  work: (entry: SandboxEntry, signal: AbortSignal) => Promise<void>,
): Promise<Failures> {
  const failures: Failures = [];
  const { signal: never } = new AbortController();
  const all = [...core.sandboxes.values()].filter(which).map(async (entry) => {
    // From when it is let in: the many that wait are not to fail for it.
    const limited = () => work(entry, AbortSignal.timeout(core.deps.config.ownWorkTimeoutMs));
    void endRevival(entry);
    try {
      await entry.queue.runOwn(() => core.workLimit.run(limited, never));
    } catch (cause) {
      failures.push({ id: entry.id, error: asRookeryError(cause) });
    }
  });
  await Promise.all(all);
  return failures;
}
