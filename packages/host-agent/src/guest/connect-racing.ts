/**
 * Connecting to a guest that is about to answer.
 *
 * The kernel sends a lost SYN again only after a second, and a guest that is
 * just thawing loses them. So attempts are started one after another, each a
 * little later than the last, and the first that connects wins; none is given
 * up early, because a guest under emulation may need long to accept. A refused
 * attempt (envd not listening yet) is tried again at once.
 */
import { connect as connectTcp } from "node:net";
import type { Socket } from "node:net";

/** Pause before each further attempt while the earlier ones hang. The sum passes any `connectMs`. */
const STAGGER_MS = [20, 40, 80, 160, 320, 640, 1_280, 2_560];
/** Least pause after a refusal. */
const RETRY_REFUSED_MS = 5;
/** A guest that boots refuses for seconds, and each try costs it something: the pause is this part of the time so far. */
const RETRY_REFUSED_PART = 0.05;
const RETRY_REFUSED_MAX_MS = 100;

/** The guest was not reached in time. */
export class NoConnection extends Error {
  override readonly name = "NoConnection";
}

/** Calls back once. Nothing is left open but the socket handed over. */
export function connectRacing(
  target: { host: string; port: number; timeoutMs: number },
  callback: (error: Error | null, socket: Socket | null) => void,
): void {
  const open = new Set<Socket>();
  let lastError: Error | undefined;
  let started = 0;
  const startedAt = performance.now();
  let next: NodeJS.Timeout | undefined;

  const finish = (error: Error | null, winner: Socket | null): void => {
    clearTimeout(deadline);
    clearTimeout(next);
    for (const socket of open) if (socket !== winner) socket.destroy();
    open.clear();
    callback(error, winner);
  };
  const deadline = setTimeout(() => {
    finish(new NoConnection("the guest takes no connections", { cause: lastError }), null);
  }, target.timeoutMs);

  const attempt = (): void => {
    const socket = connectTcp({ host: target.host, port: target.port, noDelay: true });
    open.add(socket);
    socket.once("connect", () => {
      socket.removeListener("error", onError);
      finish(null, socket);
    });
    const onError = (error: Error): void => {
      // A loser of the race, destroyed by `finish`, has nothing more to say.
      if (!open.delete(socket)) return;
      lastError = error;
      if (open.size > 0) return;
      const pauseMs = (performance.now() - startedAt) * RETRY_REFUSED_PART;
      schedule(Math.min(Math.max(pauseMs, RETRY_REFUSED_MS), RETRY_REFUSED_MAX_MS));
    };
    socket.on("error", onError);
    schedule(STAGGER_MS[Math.min(started, STAGGER_MS.length - 1)]!);
    started += 1;
  };
  const schedule = (delayMs: number): void => {
    clearTimeout(next);
    next = setTimeout(attempt, delayMs);
  };
  attempt();
}
