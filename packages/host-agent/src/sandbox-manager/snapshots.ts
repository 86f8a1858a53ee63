/**
 * The set of snapshots: making, fetching, using and deleting them do not meet.
 *
 * Invariants: files of a snapshot go only when nobody who began before its
 * deletion is still making a sandbox of it. While one is deleted nobody fetches
 * it, so a deletion that came through leaves nothing, here or in the store.
 */
import { RookeryError } from "@rookery/protocol/errors";
import type { LayerId, SandboxId, SnapshotId } from "../ids.ts";
import { shareWork } from "../image/share-work.ts";
import type { SnapshotRecord } from "../journal/records.ts";
import { compatOf } from "./compat.ts";
import { undoLimit, type Core } from "./core.ts";
import { layerIdsOf } from "./disk-layers.ts";
import type { SnapshotView } from "./sandbox.ts";
import { SnapshotUploads } from "./snapshot-uploads.ts";
import { asRookeryError } from "./steps.ts";

interface Fetching {
  abort: AbortController;
  done: Promise<void>;
}

export class Snapshots {
  readonly #core: Core;
  readonly #uploads: SnapshotUploads;
  readonly #making = new Map<SnapshotId, { source: SandboxId; promise: Promise<SnapshotView> }>();
  readonly #uses = new Map<SnapshotId, Set<Promise<void>>>();
  readonly #fetching = new Map<SnapshotId, Fetching>();
  readonly #deleting = new Map<SnapshotId, number>();
  readonly #lastUsedMs = new Map<SnapshotId, number>();
  readonly #fetchOnce = shareWork((id, signal) => this.#fetchOrFail(id as SnapshotId, signal));

  constructor(core: Core) {
    this.#core = core;
    this.#uploads = new SnapshotUploads(core, (id, work) => this.#holding(id, work));
  }

  /** Goes on with what a former agent had not sent yet. */
  startUploads(): void {
    this.#uploads.start();
  }

  async close(): Promise<void> {
    await this.#uploads.close();
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
      const view = await promise;
      this.#uploads.add(id);
      return view;
    } finally {
      this.#making.delete(id);
    }
  }

  /**
   * Fetches it when it is not here, once for all who ask. When the store does
   * not have it either, `use` says so.
   */
  async bring(id: SnapshotId, signal: AbortSignal): Promise<void> {
    if (this.#core.deps.snapshotStore === undefined || this.#core.snapshots.has(id)) return;
    await this.#fetchOnce(id, signal);
  }

  /** Keeps its files, and the layers of its chain, until disposed. */
  use(id: SnapshotId, teamId: string): { record: SnapshotRecord } & Disposable {
    const record = this.#core.snapshots.get(id);
    if (record === undefined || record.teamId !== teamId || this.#making.has(id)) {
      throw noSuchSnapshot();
    }
    this.#lastUsedMs.set(id, this.#core.deps.clock.nowMs());
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

  /** Here and in the store, whether this host has it or not. Idempotent. */
  async delete(id: SnapshotId): Promise<void> {
    this.#deleting.set(id, (this.#deleting.get(id) ?? 0) + 1);
    try {
      await this.#making.get(id)?.promise.catch(() => undefined); // its failure is its caller's
      const fetching = this.#fetching.get(id);
      fetching?.abort.abort(noSuchSnapshot());
      await fetching?.done;
      await this.#uploads.drop(id);
      await this.#removeHere(id);
      using limit = undoLimit(this.#core);
      await this.#core.deps.snapshotStore?.remove(id, limit.signal);
    } finally {
      const others = this.#deleting.get(id)! - 1;
      if (others === 0) this.#deleting.delete(id);
      else this.#deleting.set(id, others);
    }
  }

  /** The host ends: those in the store stay there, for others. Goes on past failures, which it gives back. */
  async removeAllHere(): Promise<{ id: SnapshotId; error: RookeryError }[]> {
    const failures: { id: SnapshotId; error: RookeryError }[] = [];
    for (const id of [...this.#core.snapshots.keys()]) {
      try {
        await this.#uploads.drop(id);
        await this.#removeHere(id);
      } catch (cause) {
        failures.push({ id, error: asRookeryError(cause) });
      }
    }
    return failures;
  }

  async #removeHere(id: SnapshotId): Promise<void> {
    const record = this.#core.snapshots.get(id);
    await this.#core.journal.forgetSnapshot(id);
    this.#core.snapshots.delete(id);
    this.#lastUsedMs.delete(id);
    await Promise.all([...(this.#uses.get(id) ?? [])]);
    await this.#core.journal.removeSnapshotDir(id);
    if (record !== undefined) await this.#core.layers.sweep(layerIdsOf(record.chain));
  }

  async #fetchOrFail(id: SnapshotId, signal: AbortSignal): Promise<void> {
    if (this.#core.snapshots.has(id)) return;
    if (this.#deleting.has(id)) throw noSuchSnapshot();
    const abort = new AbortController();
    const { promise, resolve } = Promise.withResolvers<void>();
    this.#fetching.set(id, { abort, done: promise });
    try {
      await this.#fetch(id, AbortSignal.any([signal, abort.signal]));
    } catch (cause) {
      abort.signal.throwIfAborted();
      throw cause;
    } finally {
      this.#fetching.delete(id);
      resolve();
    }
    await this.#evictOverBudget(id);
  }

  async #fetch(id: SnapshotId, signal: AbortSignal): Promise<void> {
    const core = this.#core;
    const { deps, journal } = core;
    using pins = new DisposableStack();
    const claimed: LayerId[] = [];
    try {
      const record = await deps.snapshotStore!.fetch(
        id,
        {
          compat: compatOf(deps, await deps.vmm.fingerprint(signal)),
          layerDir: journal.snapshotLayerDir(id),
          layersDir: journal.layersDir,
          claim: async (layers) => {
            claimed.push(...layers);
            pins.use(await core.layers.claim(layers));
          },
          makeRoom: (bytes) => this.#makeRoom(bytes),
        },
        signal,
      );
      signal.throwIfAborted();
      if (record === undefined) return;
      await journal.writeSnapshot(record);
      core.snapshots.set(id, record);
    } catch (cause) {
      await journal.removeSnapshotDir(id);
      pins.dispose();
      await core.layers.sweep(claimed);
      throw cause;
    }
  }

  async #makeRoom(bytes: number): Promise<void> {
    const { host, config } = this.#core.deps;
    while ((await host.freeDiskBytes(config.dataDir)) - bytes < config.diskReserveBytes) {
      const [oldest] = this.#evictable();
      if (oldest === undefined) {
        throw new RookeryError("out_of_disk", "this host's disk has no place for the snapshot");
      }
      await this.#removeHere(oldest.id);
    }
  }

  async #evictOverBudget(newest: SnapshotId): Promise<void> {
    const { config, logger } = this.#core.deps;
    const evictable = this.#evictable().filter(({ id }) => id !== newest);
    let bytes = [...this.#core.snapshots.values()].reduce((sum, one) => sum + (one.imported?.bytes ?? 0), 0);
    for (const { id, imported } of evictable) {
      if (bytes <= config.snapshotCacheBytes) return;
      if ((this.#uses.get(id)?.size ?? 0) > 0) continue; // since the removal before this one began
      await this.#removeHere(id);
      logger.info({ snapshotId: id, bytes: imported!.bytes }, "a copy of a snapshot went: the store has it");
      bytes -= imported!.bytes;
    }
  }

  /** Copies of what the store has and nobody is using, the longest unused first. */
  #evictable(): SnapshotRecord[] {
    const lastUse = ({ id, imported }: SnapshotRecord): number => this.#lastUsedMs.get(id) ?? imported!.atMs;
    return [...this.#core.snapshots.values()]
      .filter(({ id, imported }) => imported !== undefined && !this.#uses.has(id) && !this.#deleting.has(id))
      .toSorted((a, b) => lastUse(a) - lastUse(b));
  }

  /** Runs `work` on a snapshot whose files stay meanwhile. */
  async #holding(id: SnapshotId, work: (record: SnapshotRecord) => Promise<void>): Promise<void> {
    const record = this.#core.snapshots.get(id);
    if (record === undefined) return;
    using _pin = this.#core.layers.pin(layerIdsOf(record.chain));
    await work(record);
  }
}

function noSuchSnapshot(): RookeryError {
  return new RookeryError("template_not_found", "there is no such snapshot here");
}

export function viewOfSnapshot(record: SnapshotRecord): SnapshotView {
  const { id, vcpus, memoryMb, diskMb, sizeBytes, compat, storeId } = record;
  return { snapshotId: id, vcpus, memoryMb, diskMb, sizeBytes, compat, storeId };
}
