/**
 * Snapshots in the object store: sent by the host that made them, fetched by
 * those that are to start sandboxes of them.
 *
 * A snapshot is a difference: its memory from a warm image, its disk from the
 * image and the warm image's disk layer. Two hosts never boot the same memory,
 * so what it differs from travels too, each content once for all snapshots.
 *
 * Invariants: the manifest is put last and names only what was there; what is
 * fetched gets its name on this host last, so a crash leaves parts of downloads,
 * or whole things that nobody needs yet, and the sweeps know both.
 */
import { readdir } from "node:fs/promises";
import { join } from "node:path";
import { RookeryError } from "@rookery/protocol/errors";
import { isLoadable } from "@rookery/protocol/memory-compat";
import type { SnapshotId } from "../ids.ts";
import type { SnapshotRecord } from "../journal/records.ts";
import type { ObjectStore } from "../object-store/object-store.ts";
import type { DiskLayer, RootDiskDriver } from "../root-disk/root-disk.ts";
import type { Logger } from "../sandbox-manager/deps.ts";
import type { FetchRequest, SnapshotStore } from "../sandbox-manager/snapshot-store.ts";
import type { WarmImage } from "../sandbox-manager/warm-images.ts";
import { WARM_MANIFEST } from "../warm-images/warm-manifest.ts";
import { BLOB_KEY, blobKey, Blobs, SWEEP_AFTER_MS } from "./blobs.ts";
import { ContentRefs } from "./content-refs.ts";
import { fetchSnapshot, type FetchTools, type WarmTaker } from "./fetch-snapshot.ts";
import { FetchedImages } from "./fetched-images.ts";
import { OneAtATime } from "./one-at-a-time.ts";
import { progressLog } from "./progress-log.ts";
import {
  contentsOf,
  MAX_MANIFEST_BYTES,
  SNAPSHOT_KEY,
  snapshotKey,
  storedSnapshotSchema,
  type Content,
  type StoredSnapshot,
} from "./stored-snapshot.ts";

export interface SnapshotStoreOptions {
  store: ObjectStore;
  dataDir: string;
  /** Where images of this host lie, by their hash. */
  imagesDir: string;
  warmImages: WarmTaker;
  rootDisk: RootDiskDriver;
  compatOf(fingerprint: string): string;
  nowMs: () => number;
  sleep: (ms: number, signal: AbortSignal) => Promise<void>;
  logger: Logger;
}

/** A content may be swept away between the look and the manifest that names it; then it is sent again. */
const SENDS = 3;

export class StoredSnapshots implements SnapshotStore {
  readonly #options: SnapshotStoreOptions;
  readonly #blobs: Blobs;
  readonly #refs: ContentRefs;
  readonly #tools: FetchTools;
  #storeId: string | undefined;

  private constructor(options: SnapshotStoreOptions, blobs: Blobs, refs: ContentRefs, images: FetchedImages) {
    this.#options = options;
    this.#blobs = blobs;
    this.#refs = refs;
    this.#tools = { ...options, blobs, images, layersAtWork: new OneAtATime() };
  }

  static async open(options: SnapshotStoreOptions): Promise<StoredSnapshots> {
    const dir = join(options.dataDir, "store");
    const { store, nowMs, sleep } = options;
    const blobs = new Blobs({ store, partsDir: join(dir, "parts"), nowMs, sleep });
    await blobs.open();
    const refs = await ContentRefs.open(join(dir, "contents.json"));
    const images = await FetchedImages.open({
      dir: join(dir, "images"),
      imagesDir: options.imagesDir,
      blobs,
      refs,
      nowMs,
    });
    return new StoredSnapshots(options, blobs, refs, images);
  }

  /** Undefined while the store cannot be asked. */
  async storeId(signal: AbortSignal): Promise<string | undefined> {
    try {
      this.#storeId ??= await this.#options.store.identity(signal);
    } catch (cause) {
      this.#options.logger.warn({ err: cause }, "the object store does not say which one it is");
    }
    return this.#storeId;
  }

  async send(record: SnapshotRecord, layerDir: string, signal: AbortSignal): Promise<string> {
    const { store, logger } = this.#options;
    const storeId = await store.identity(signal);
    const warm = await this.#options.warmImages.open(record.warmKey, signal);
    if (warm === undefined) throw new RookeryError("host_error", "the snapshot's warm image is gone");
    const { paths, manifest } = await this.#describe(record, warm, layerDir, signal);
    const contents = contentsOf(manifest);
    const totalBytes = contents.reduce((sum, one) => sum + one.dataBytes, 0);
    const progress = progressLog(logger, "sending a snapshot", { snapshotId: record.id, totalBytes });
    let sentBytes = 0;
    for (const one of contents) {
      if ((await this.#blobs.send(paths.get(one.sha256)!, one, signal)) === "sent")
        sentBytes += one.dataBytes;
      progress.add(one.dataBytes);
    }
    for (let attempt = 1; ; attempt += 1) {
      await store.put(snapshotKey(record.id), once(JSON.stringify(manifest)), signal);
      const missing = await this.#missing(contents, signal);
      if (missing.length === 0) break;
      if (attempt === SENDS)
        throw new RookeryError("unavailable", "The object store loses what is put there.");
      for (const one of missing) await this.#blobs.send(paths.get(one.sha256)!, one, signal);
    }
    progress.end({ sentBytes });
    return storeId;
  }

  async fetch(
    id: SnapshotId,
    request: FetchRequest,
    signal: AbortSignal,
  ): Promise<SnapshotRecord | undefined> {
    const manifest = await this.#manifest(snapshotKey(id), signal);
    if (manifest === undefined || manifest.id !== id) return undefined;
    if (!isLoadable(manifest.compat, request.compat)) {
      throw new RookeryError(
        "no_capacity",
        "This host cannot load the snapshot: its CPU, VMM or network is not that of the host that made it.",
      );
    }
    const storeId = await this.#options.store.identity(signal);
    return { ...(await fetchSnapshot(manifest, request, this.#tools, signal)), storeId };
  }

  async remove(id: SnapshotId, signal: AbortSignal): Promise<void> {
    await this.#options.store.delete(snapshotKey(id), signal);
  }

  async sweep(signal: AbortSignal): Promise<void> {
    const { store, nowMs, logger } = this.#options;
    // First what may go, then what must stay: a snapshot that is sent meanwhile is seen.
    const old = new Set<string>();
    for await (const { key, modifiedMs } of store.list("blobs/", signal)) {
      const sha256 = BLOB_KEY.exec(key)?.[1];
      if (sha256 !== undefined && nowMs() - modifiedMs > SWEEP_AFTER_MS) old.add(sha256);
    }
    if (old.size === 0) return;
    for await (const { key } of store.list("snapshots/", signal)) {
      if (!SNAPSHOT_KEY.test(key)) continue;
      // One that cannot be read ends the sweep: what it needs is not known.
      const manifest = await this.#manifest(key, signal);
      if (manifest !== undefined) for (const one of contentsOf(manifest)) old.delete(one.sha256);
    }
    let removed = 0;
    for (const sha256 of old) {
      const facts = await store.head(blobKey(sha256), signal);
      if (facts === undefined || nowMs() - facts.modifiedMs <= SWEEP_AFTER_MS) continue;
      await store.delete(blobKey(sha256), signal);
      removed += 1;
    }
    if (removed > 0) logger.info({ removed }, "removed contents that no snapshot in the store needs");
  }

  async sweepImages(inUse: ReadonlySet<string>): Promise<void> {
    const ofWarmImages = this.#options.warmImages.list().flatMap(({ diskChain }) => diskChain);
    await this.#tools.images.sweep(new Set([...inUse, ...ofWarmImages.map(({ path }) => path)]));
  }

  async #missing(contents: readonly Content[], signal: AbortSignal): Promise<Content[]> {
    const missing: Content[] = [];
    for (const one of contents) if (!(await this.#blobs.has(one, signal))) missing.push(one);
    return missing;
  }

  async #manifest(key: string, signal: AbortSignal): Promise<StoredSnapshot | undefined> {
    const object = await this.#options.store.get(key, { from: 0 }, signal);
    if (object === undefined) return undefined;
    const parts: Uint8Array[] = [];
    let bytes = 0;
    for await (const piece of object.body) {
      bytes += piece.length;
      if (bytes > MAX_MANIFEST_BYTES) throw unreadable(key);
      parts.push(piece);
    }
    try {
      return storedSnapshotSchema.parse(JSON.parse(Buffer.concat(parts).toString("utf8")));
    } catch (cause) {
      throw unreadable(key, { cause });
    }
  }

  /** What it consists of, and where each content lies here. */
  async #describe(
    record: SnapshotRecord,
    warm: WarmImage,
    layerDir: string,
    signal: AbortSignal,
  ): Promise<{ manifest: StoredSnapshot; paths: ReadonlyMap<string, string> }> {
    const paths = new Map<string, string>();
    const refOf = async (path: string): Promise<Content> => {
      const ref = await this.#refs.of(path, signal);
      paths.set(ref.sha256, path);
      return ref;
    };
    const filesOf = async (dir: string, without?: string): Promise<Record<string, Content>> => {
      const names = (await readdir(dir, { withFileTypes: true }))
        .filter((entry) => entry.isFile() && entry.name !== without)
        .map((entry) => entry.name);
      const all: Record<string, Content> = {};
      for (const name of names) all[name] = await refOf(join(dir, name));
      return all;
    };
    const layersOf = async (chain: readonly DiskLayer[]): Promise<Content[]> => {
      const all: Content[] = [];
      for (const { path } of chain.slice(1)) all.push(await refOf(path));
      return all;
    };
    const [image] = record.chain;
    if (image?.kind !== "image" || warm.diskChain[0]?.path !== image.path) {
      throw new Error(`${record.id}: its disk and its memory stand on different images`);
    }
    if (warm.image === undefined) throw new Error(`${record.id}: nobody knows what its image was built from`);
    const { memorySha256, deviceStateSha256, fingerprint } = warm.base;
    const manifest: StoredSnapshot = {
      version: 1,
      id: record.id,
      teamId: record.teamId,
      sourceSandboxId: record.sourceSandboxId,
      machineId: record.machineId,
      createdAtMs: record.createdAtMs,
      compat: this.#options.compatOf(fingerprint),
      vcpus: record.vcpus,
      memoryMb: record.memoryMb,
      diskMb: record.diskMb,
      sizeBytes: record.sizeBytes,
      image: { ...warm.image, disk: await refOf(image.path) },
      warm: {
        memory: { sha256: memorySha256, deviceStateSha256, fingerprint },
        // Its own manifest says where things lie on this host.
        files: await filesOf(warm.base.dir, WARM_MANIFEST),
        layers: await layersOf(warm.diskChain),
        diskSizeBytes: warm.diskSizeBytes,
      },
      memory: { files: await filesOf(layerDir), ...record.layer },
      layers: await layersOf(record.chain),
    };
    return { manifest: storedSnapshotSchema.parse(manifest), paths };
  }
}

function unreadable(key: string, options?: ErrorOptions): RookeryError {
  return new RookeryError("host_error", `${key} in the object store is not what it should be.`, options);
}

async function* once(text: string): AsyncGenerator<Uint8Array> {
  yield Buffer.from(text);
}
