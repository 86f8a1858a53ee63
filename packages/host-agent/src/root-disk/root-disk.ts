/**
 * The seam to root disks: a writable top over a chain of read-only layers.
 *
 * Invariants: a layer is never written again once it has a name; a top is
 * written by at most one VMM. A disk lives in one directory (`dir`) that can be
 * renamed as a whole; `disk.json` in it (temporary file, fsync, rename) lists
 * its chain, so the set of layers in use follows from the manifests alone and
 * no count of references is stored.
 */
import type { LayerId } from "../ids.ts";

/** A read-only file that disks stand on: the image's own disk or a frozen top. */
export type DiskLayer =
  | { kind: "image"; path: string; format: "raw" }
  | { kind: "layer"; id: LayerId; path: string; format: "qcow2" };

/** A disk as its driver knows it. JSON-serialisable. */
export interface RootDisk {
  driver: RootDiskDriver["kind"];
  dir: string;
  /** Bottom first. The top is not in it. */
  chain: readonly DiskLayer[];
  sizeBytes: number;
}

/** A disk as a VMM sees it, from inside its private mount namespace. */
export type DiskAttachment =
  | {
      kind: "file-chain";
      /** Top first; only the first is writable. Names are relative to the VMM's run directory. */
      nodes: readonly { file: string; format: "raw" | "qcow2"; readOnly: boolean }[];
      sizeBytes: number;
    }
  | { kind: "block-device"; path: string; sizeBytes: number };

/** The VMM's own directory and the uid it runs under: what `attach` makes files visible in. */
export interface DiskUser {
  runDir: string;
  uid: number;
}

export interface RootDiskDriver {
  readonly kind: "qcow2" | "device-mapper" | "simulated";
  probe(signal: AbortSignal): Promise<{ ok: boolean; reason?: string }>;

  /** Makes an empty top over `chain` in `dir` (made if absent). `sizeBytes` is at least the chain's. */
  create(
    options: { dir: string; chain: readonly DiskLayer[]; sizeBytes: number },
    signal: AbortSignal,
  ): Promise<RootDisk>;
  /** Reads `disk.json` back, checked by a schema. */
  open(dir: string): Promise<RootDisk>;

  /**
   * Gives the VMM its files: hard links in `user.runDir`, the top owned by
   * `user.uid`, layers by root and read-only. Idempotent. A pooled VMM changes
   * disks when it thaws, so two disks may stand in one run directory at once:
   * tops of different disks must have different names there.
   */
  attach(disk: RootDisk, user: DiskUser, signal: AbortSignal): Promise<DiskAttachment>;
  /** Takes them back once the VMM's process is gone: links removed, top root's again. Bears running twice. */
  detach(disk: RootDisk, user: DiskUser, signal: AbortSignal): Promise<void>;

  /**
   * First half of a fork of a running disk: makes the next top beside the
   * present one, and its link in the run directory. The VMM then switches to
   * `next` while its guest is frozen, and `commitNextTop` turns the old top into a layer.
   * A next top that is there already is kept as it is: after a crash of the agent
   * a VMM may be writing to it.
   */
  prepareNextTop(
    disk: RootDisk,
    user: DiskUser | undefined,
    signal: AbortSignal,
  ): Promise<{ next: DiskAttachment }>;
  /**
   * The old top becomes layer `layerId` below `layersDir` (root's, read-only,
   * durable), the prepared one the top; `disk.json` is replaced last. Without a
   * VMM (a paused sandbox), call `prepareNextTop` with no user first.
   * Safe to repeat after a crash at any line.
   */
  commitNextTop(
    disk: RootDisk,
    options: { layerId: LayerId; layersDir: string },
    signal: AbortSignal,
  ): Promise<RootDisk>;
  /**
   * Takes a file that another host wrote in as layer `layerId` over `below`
   * (bottom first): moves it below `layersDir`, root's, read-only, durable. Throws
   * before anything reads it when it is not a layer such as ours. A layer of that
   * id that is there already is kept. Drivers without it do not share snapshots.
   */
  adoptLayer?(
    options: { file: string; layerId: LayerId; layersDir: string; below: readonly DiskLayer[] },
    signal: AbortSignal,
  ): Promise<DiskLayer>;
  /** Forgets a prepared next top that no VMM switched to. Bears running twice. */
  abortNextTop(disk: RootDisk, user: DiskUser | undefined): Promise<void>;

  /**
   * Grows the top (never shrinks). Only while no VMM holds it, or after a running
   * VMM has resized it itself: then only the manifest is left to write.
   */
  grow(disk: RootDisk, sizeBytes: number, signal: AbortSignal): Promise<RootDisk>;
  /** Chains longer than the driver's limit are slow: true when `flatten` is due. */
  needsFlatten(disk: RootDisk): boolean;
  /**
   * Merges all layers above the image into one new top; the chain is then the
   * image alone. Only while no VMM holds the disk. A crash leaves the old or the new, never neither.
   */
  flatten(disk: RootDisk, signal: AbortSignal): Promise<RootDisk>;
  /** Really allocated for the top: st_blocks * 512. */
  allocatedBytes(disk: RootDisk): Promise<number>;
  /** fsync of all that `open` would need. */
  sync(disk: RootDisk): Promise<void>;
  /** Removes `dir`; layers stay. Bears running twice. */
  remove(dir: string): Promise<void>;
}
