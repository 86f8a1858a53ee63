/**
 * How much the agent does at once: a bounded number of operations, first come
 * first served. Background work (the pool's refill) gives way to them.
 */
import type { Clock } from "./clock.ts";

export class WorkLimit {
  readonly #limit: number;
  readonly #clock: Clock;
  readonly #queue: (() => void)[] = [];
  readonly #quietWaiters = new Set<() => void>();
  #active = 0;

  constructor(limit: number, clock: Clock) {
    this.#limit = limit;
    this.#clock = clock;
  }

  get active(): number {
    return this.#active;
  }

  /** Its queue is bounded by those of the sandboxes, and each waiter by its signal. */
  async run<T>(work: () => Promise<T>, signal: AbortSignal): Promise<T> {
    await this.#enter(signal);
    try {
      return await work();
    } finally {
      this.#leave();
    }
  }

  /** Resolves when no operation is at work, at the latest after `maxWaitMs`. */
  async whenQuiet(maxWaitMs: number): Promise<void> {
    if (this.#active === 0) return;
    const { promise, resolve } = Promise.withResolvers<void>();
    using _timer = this.#clock.after(maxWaitMs, resolve);
    this.#quietWaiters.add(resolve);
    await promise;
    this.#quietWaiters.delete(resolve);
  }

  async #enter(signal: AbortSignal): Promise<void> {
    signal.throwIfAborted();
    if (this.#active < this.#limit) {
      this.#active += 1;
      return;
    }
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    const onAbort = () => {
      const index = this.#queue.indexOf(resolve);
      if (index === -1) return; // was let in at the same moment
      this.#queue.splice(index, 1);
      reject(signal.reason as Error);
    };
    this.#queue.push(resolve);
    signal.addEventListener("abort", onAbort, { once: true });
    try {
      await promise;
    } finally {
      signal.removeEventListener("abort", onAbort);
    }
  }

  #leave(): void {
    const next = this.#queue.shift();
    if (next !== undefined) {
      next(); // hands its place over
      return;
    }
    this.#active -= 1;
    if (this.#active === 0) for (const wake of this.#quietWaiters) wake();
  }
}
