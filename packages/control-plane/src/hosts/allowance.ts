/** How much one host may make us do: a burst at once, then so much a second. Time is the caller's. */
export class Allowance {
  readonly #burst: number;
  readonly #perSec: number;
  #left: number;
  #at: number;

  constructor(options: { burst: number; perSec: number; now: number }) {
    this.#burst = options.burst;
    this.#perSec = options.perSec;
    this.#left = options.burst;
    this.#at = options.now;
  }

  /** Takes one; how many milliseconds to wait before using it. */
  take(now: number): number {
    // A clock that was set back gives nothing, and takes nothing.
    const gained = (Math.max(0, now - this.#at) / 1000) * this.#perSec;
    this.#at = now;
    this.#left = Math.min(this.#burst, this.#left + gained) - 1;
    return this.#left >= 0 ? 0 : (-this.#left / this.#perSec) * 1000;
  }
}
