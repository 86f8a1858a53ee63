/**
 * Time, injected. Deadlines that replicas share are read from the database's
 * clock instead: this one is for what one process waits for.
 */
import { setTimeout as wait } from "node:timers/promises";

export interface Clock {
  /** Milliseconds since 1970. */
  now(): number;
  /** Ends early, without an error, when `signal` aborts. */
  sleep(ms: number, signal?: AbortSignal): Promise<void>;
}

export const systemClock: Clock = {
  now: () => Date.now(),
  async sleep(ms, signal) {
    try {
      await wait(ms, undefined, { signal });
    } catch (cause) {
      if (!signal?.aborted) throw cause;
    }
  },
};
