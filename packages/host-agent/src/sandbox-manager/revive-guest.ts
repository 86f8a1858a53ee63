/**
 * An envd that crashed and was started again in its guest has no identity: it
 * knows neither token nor environment, and serves nobody. It gets them again
 * here, by another `/init` of the same sandbox.
 *
 * Nobody looks for it: an idle guest is left alone. A call that fails is what
 * brings us here, and whoever made it. One revival of a sandbox is under way at
 * a time. It waits for envd outside of the sandbox's queue and gives way to any
 * command (a resume brings an identity anyway); only `/init` itself is in the
 * queue, for no pause or snapshot may come in between. A guest that makes its
 * envd crash again and again is answered ever more rarely.
 */
import { RookeryError } from "@rookery/protocol/errors";
import type { PlacedVm } from "../vm-pool/vm-pool.ts";
import { deadlineSignal } from "./clock.ts";
import { envdTargetOf, type Core, type SandboxEntry } from "./core.ts";
import { startGuest } from "./start-guest.ts";

/** After the first one; doubled by each that follows. */
const FIRST_PAUSE_MS = 1_000;
const LONGEST_PAUSE_MS = 60_000;
const FORGOTTEN_AFTER_MS = 600_000;
/** An envd that crashed is started again after a second, and under emulation needs a few more. */
const REVIVAL_WAIT_MS = 10_000;

/** See `SandboxOperations.reviveGuest`. */
export function reviveGuest(core: Core, entry: SandboxEntry): Promise<boolean> {
  const { revivals, placed } = entry;
  if (revivals.underWay !== undefined) return revivals.underWay.promise;
  if (entry.phase !== "running" || placed?.vm.state !== "running") return Promise.resolve(false);
  // Many calls may have failed by one crash, and some of them say so only now.
  if (core.deps.clock.nowMs() < revivals.notBeforeMs) return Promise.resolve(revivals.succeeded);
  const abort = new AbortController();
  const promise = revive(core, entry, placed, abort.signal).finally(() => {
    revivals.underWay = undefined;
  });
  revivals.underWay = { promise, abort };
  return promise;
}

/**
 * Waits for the revival that is under way, if there is one, and no longer than
 * callers have patience: what they would hear meanwhile is that nobody answers.
 */
export async function awaitRevival(core: Core, entry: SandboxEntry): Promise<void> {
  const { underWay } = entry.revivals;
  if (underWay === undefined) return;
  const tooLong = Promise.withResolvers<void>();
  using _timer = core.deps.clock.after(REVIVAL_WAIT_MS, () => tooLong.resolve());
  await Promise.race([underWay.promise, tooLong.promise]);
}

/** A command comes, or the agent ends: the revival lets go at once. */
export async function endRevival(entry: SandboxEntry): Promise<void> {
  const { underWay } = entry.revivals;
  underWay?.abort.abort(new RookeryError("unavailable", "a command came in between"));
  await underWay?.promise;
}

async function revive(
  core: Core,
  entry: SandboxEntry,
  placed: PlacedVm,
  signal: AbortSignal,
): Promise<boolean> {
  const { clock, config, guest, logger } = core.deps;
  const ended = new AbortController();
  void placed.vm.exited.then(() => ended.abort(new RookeryError("guest_error", "the guest has ended")));
  using limit = deadlineSignal(
    clock,
    config.guestTimeoutMs,
    () => new RookeryError("guest_error", "envd does not answer"),
    [signal, ended.signal],
  );
  const facts = { sandboxId: entry.id };
  try {
    if (await guest.knowsToken(envdTargetOf(entry, placed), limit.signal)) return true;
    await entry.queue.runOwn(async () => {
      limit.signal.throwIfAborted();
      if (entry.placed !== placed || entry.phase !== "running" || placed.vm.state !== "running") {
        throw new RookeryError("wrong_state", "it does not run any more");
      }
      await startGuest(core, entry, placed, { growRootFs: false }, limit.signal);
    });
    pauseRevivals(entry, clock.nowMs(), { succeeded: true });
    logger.warn(facts, "envd was started again in its guest, and has its identity again");
    return true;
  } catch (cause) {
    if (signal.aborted) return false;
    pauseRevivals(entry, clock.nowMs(), { succeeded: false });
    logger.warn({ ...facts, err: cause }, "envd serves nobody, and could not be given its identity");
    return false;
  }
}

function pauseRevivals(
  { revivals }: SandboxEntry,
  nowMs: number,
  { succeeded }: { succeeded: boolean },
): void {
  if (nowMs - revivals.notBeforeMs > FORGOTTEN_AFTER_MS) revivals.inARow = 0;
  const pauseMs = Math.min(FIRST_PAUSE_MS * 2 ** revivals.inARow, LONGEST_PAUSE_MS);
  revivals.inARow += 1;
  revivals.succeeded = succeeded;
  revivals.notBeforeMs = nowMs + pauseMs;
}
