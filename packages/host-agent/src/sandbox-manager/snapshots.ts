/**
 * The set of snapshots: making, using and deleting them do not meet.
 *
 * Invariant: files of a snapshot go only when nobody who began before its
 * deletion is still making a sandbox of it.
 */
import { RookeryError } from "@rookery/protocol/errors";
import type { SandboxId, SnapshotId } from "../ids.ts";
import type { SnapshotRecord } from "../journal/records.ts";
import type { Core } from "./core.ts";
import { layerIdsOf } from "./disk-layers.ts";
import type { SnapshotView } from "./sandbox.ts";

export class Snapshots {
  readonly #core: Core;
  readonly #making = new Map<SnapshotId, { source: SandboxId; promise: Promise<SnapshotView> }>();
  readonly #uses = new Map<SnapshotId, Set<Promise<void>>>();

  constructor(core: Core) {
    this.#core = core;
  }

  /** Makes it once; who repeats it joins, or gets what is there. */
  async make(
    id: SnapshotId,
    { sandboxId: source }: { sandboxId: SandboxId },
    make: () => Promise<SnapshotView>,
  ): Promise<SnapshotView> {
    const made = this.#core.snapshots.get(id);
    const making = this.#making.get(id);
    const knownSource = making?.source ?? made?.sourceSandboxId;
    if (knownSource !== undefined && knownSource !== source) {
      throw new RookeryError("already_exists", "a snapshot of this id is here already");
    }
    if (making !== undefined) return await making.promise;
    if (made !== undefined) return viewOfSnapshot(made);
    const promise = make();
    this.#making.set(id, { source, promise });
    try {
      return await promise;
    } finally {
      this.#making.delete(id);
    }
  }

  /** Keeps its files, and the layers of its chain, until disposed. */
  use(id: SnapshotId, teamId: string): { record: SnapshotRecord } & Disposable {
    const record = this.#core.snapshots.get(id);
    if (record === undefined || record.teamId !== teamId || this.#making.has(id)) {
      throw new RookeryError("template_not_found", "there is no such snapshot here");
    }
    const pin = this.#core.layers.pin(layerIdsOf(record.chain));
    const { promise, resolve } = Promise.withResolvers<void>();
    const uses = this.#uses.get(id) ?? new Set();
    this.#uses.set(id, uses.add(promise));
    return {
      record,
      [Symbol.dispose]: () => {
        pin[Symbol.dispose]();
        uses.delete(promise);
        if (uses.size === 0) this.#uses.delete(id);
        resolve();
      },
    };
  }

  /** Idempotent. */
  async delete(id: SnapshotId): Promise<void> {
    await this.#making.get(id)?.promise.catch(() => undefined); // its failure is its caller's
    const record = this.#core.snapshots.get(id);
    await this.#core.journal.forgetSnapshot(id);
    this.#core.snapshots.delete(id);
    await Promise.all([...(this.#uses.get(id) ?? [])]);
    await this.#core.journal.removeSnapshotDir(id);
    if (record !== undefined) await this.#core.layers.sweep(layerIdsOf(record.chain));
  }
}

export function viewOfSnapshot(record: SnapshotRecord): SnapshotView {
  const { id, vcpus, memoryMb, diskMb, sizeBytes } = record;
  return { snapshotId: id, vcpus, memoryMb, diskMb, sizeBytes };
}
