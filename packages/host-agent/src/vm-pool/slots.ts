/**
 * Slots: host-local indices from which a VM's addresses and uid follow.
 *
 * Invariant: a slot has at most one holder, from `take` until all that bore its
 * number is gone and `free` is called. The lowest free one is taken, so that
 * names on the host repeat and a leak is seen.
 */
import { RookeryError } from "@rookery/protocol/errors";
import type { Slot } from "../ids.ts";

export class Slots {
  readonly #maxSlots: number;
  readonly #taken = new Set<Slot>();

  constructor(maxSlots: number) {
    this.#maxSlots = maxSlots;
  }

  take(): Slot {
    for (let index = 0; index < this.#maxSlots; index += 1) {
      const slot = index as Slot;
      if (!this.#taken.has(slot)) {
        this.#taken.add(slot);
        return slot;
      }
    }
    throw new RookeryError("no_capacity", "this host has no free network slot");
  }

  /** For recovery: the journal says that it is in use. */
  reserve(slot: Slot): void {
    this.#taken.add(slot);
  }

  free(slot: Slot): void {
    this.#taken.delete(slot);
  }

  has(slot: Slot): boolean {
    return this.#taken.has(slot);
  }

  get takenCount(): number {
    return this.#taken.size;
  }
}
