/**
 * What the manager needs of the object store: snapshots as wholes. `snapshot-store/`
 * knows what they consist of there.
 */
import type { LayerId, SnapshotId } from "../ids.ts";
import type { SnapshotRecord } from "../journal/records.ts";

export interface FetchRequest {
  /** Of this host. */
  compat: string;
  /** Where its memory layer is to lie; empty. */
  layerDir: string;
  layersDir: string;
  /** Keeps layers, there or not, until the record of the snapshot does. */
  claim(layers: readonly LayerId[]): Promise<void>;
  /** Throws `out_of_disk` when this host has no place for so much. */
  makeRoom(bytes: number): Promise<void>;
}

export interface SnapshotStore {
  /** Sends all that the snapshot consists of and that is not there yet; gives back the store's id. Bears repetition. */
  send(record: SnapshotRecord, layerDir: string, signal: AbortSignal): Promise<string>;
  /**
   * Brings its files here and gives back the record that makes them a snapshot,
   * yet to be written. Of whichever team: who uses it asks. Undefined: the store has no such snapshot.
   * `no_capacity`: this host cannot load it.
   */
  fetch(id: SnapshotId, request: FetchRequest, signal: AbortSignal): Promise<SnapshotRecord | undefined>;
  /** From the store. Idempotent. */
  remove(id: SnapshotId, signal: AbortSignal): Promise<void>;
  /** Removes what no snapshot in the store refers to any more. */
  sweep(signal: AbortSignal): Promise<void>;
  /** Removes fetched image disks that no chain of this host names. */
  sweepImages(inUse: ReadonlySet<string>): Promise<void>;
}
