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
import { RookeryError } from "@rookery/protocol/errors";

/** Pause before each further attempt while the earlier ones hang. The sum passes any `connectMs`. */
const STAGGER_MS = [15, 30, 60, 120, 240, 480, 960, 1_920, 3_840];
/** Pause after a refusal: the guest's stack lives, so the next try costs little. */
const RETRY_REFUSED_MS = 5;

/** Calls back once. Nothing is left open but the socket handed over. */
export function connectRacing(
  target: { host: string; port: number; timeoutMs: number },
  callback: (error: Error | null, socket: Socket | null) => void,
): void {
  const open = new Set<Socket>();
  let lastError: Error | undefined;
  let started = 0;
  let next: NodeJS.Timeout | undefined;

  const finish = (error: Error | null, winner: Socket | null): void => {
    clearTimeout(deadline);
    clearTimeout(next);
    for (const socket of open) if (socket !== winner) socket.destroy();
    open.clear();
    callback(error, winner);
  };
  const deadline = setTimeout(() => {
    finish(
      new RookeryError("guest_error", "The sandbox's guest takes no connections", { cause: lastError }),
      null,
    );
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
      if (open.size === 0) schedule(RETRY_REFUSED_MS);
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
