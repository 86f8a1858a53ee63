/**
 * Work that comes again and again until the process ends. A round that fails is
 * logged and the next one comes; `wake` brings it at once.
 */
import type { Clock } from "../model/clock.ts";
import type { Log } from "../model/log.ts";

export interface Loop {
  /** The next round begins now, or right after the one that runs. */
  wake(): void;
  /** Settles when `signal` has aborted and the last round is over. */
  done: Promise<void>;
}

export function startLoop(
  options: { name: string; everyMs: number; clock: Clock; log: Log; signal: AbortSignal },
  round: () => Promise<void>,
): Loop {
  const { name, everyMs, clock, log, signal } = options;
  let alarm = new AbortController();
  const run = async (): Promise<void> => {
    while (!signal.aborted) {
      try {
        await round();
      } catch (cause) {
        if (!signal.aborted) log.error({ err: cause, loop: name }, "a round failed; the next one comes");
      }
      await clock.sleep(everyMs, AbortSignal.any([signal, alarm.signal]));
      if (alarm.signal.aborted) alarm = new AbortController();
    }
  };
  return { wake: () => alarm.abort(), done: run() };
}
