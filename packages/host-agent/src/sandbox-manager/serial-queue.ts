/**
 * A queue that does one thing at a time, in order, and refuses more than a bound.
 */
import { RookeryError } from "@rookery/protocol/errors";

export class SerialQueue {
  readonly #maxWaiting: number;
  #tail: Promise<void> = Promise.resolve();
  #length = 0;

  constructor(maxWaiting: number) {
    this.#maxWaiting = maxWaiting;
  }

  /** At work or waiting. */
  get length(): number {
    return this.#length;
  }

  async run<T>(work: () => Promise<T>): Promise<T> {
    this.requireRoom();
    return await this.runOwn(work);
  }

  requireRoom(): void {
    if (this.#length > this.#maxWaiting) {
      throw new RookeryError("unavailable", "too many commands wait for this sandbox; try again");
    }
  }

  /** The agent's own work, of which there is little: it is never refused. */
  async runOwn<T>(work: () => Promise<T>): Promise<T> {
    this.#length += 1;
    const mine = this.#tail.then(work);
    // The next one waits for this one, whether it succeeds or not; the caller gets the failure.
    this.#tail = mine.then(
      () => undefined,
      () => undefined,
    );
    try {
      return await mine;
    } finally {
      this.#length -= 1;
    }
  }

  /** Resolves when all that was in it before is done. */
  async idle(): Promise<void> {
    await this.#tail;
  }
}
