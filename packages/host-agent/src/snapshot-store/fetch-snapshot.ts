/**
 * Brings one snapshot to this host: image disk, warm image, disk layers, memory
 * layer, in that order, each only when it is not here yet.
 */
import { mkdir, rm, stat } from "node:fs/promises";
import { join } from "node:path";
import pLimit from "p-limit";
import { removeTree, syncDirectory } from "../host/atomic-file.ts";
import { isErrno } from "../host/errno.ts";
import type { LayerId, WarmKey } from "../ids.ts";
import type { SnapshotRecord } from "../journal/records.ts";
import type { DiskLayer, RootDiskDriver } from "../root-disk/root-disk.ts";
import type { Logger } from "../sandbox-manager/deps.ts";
import type { FetchRequest } from "../sandbox-manager/snapshot-store.ts";
import type { WarmImage } from "../sandbox-manager/warm-images.ts";
import type { WarmManifest } from "../warm-images/warm-manifest.ts";
import type { Blobs } from "./blobs.ts";
import type { FetchedImages } from "./fetched-images.ts";
import type { OneAtATime } from "./one-at-a-time.ts";
import { progressLog, type ProgressLog } from "./progress-log.ts";
import { fetchedWarmKey, layerIdsOfChain, type Content, type StoredSnapshot } from "./stored-snapshot.ts";

/** The part of the store of warm images that is used here. */
export interface WarmTaker {
  open(key: WarmKey, signal: AbortSignal): Promise<WarmImage | undefined>;
  takeIn(
    key: WarmKey,
    fill: (dir: string, signal: AbortSignal) => Promise<WarmManifest>,
    signal: AbortSignal,
  ): Promise<WarmImage>;
  /** All that are here. */
  list(): readonly Pick<WarmImage, "diskChain">[];
}

export interface FetchTools {
  blobs: Blobs;
  images: FetchedImages;
  /** By layer, one thing at a time. */
  layersAtWork: OneAtATime;
  warmImages: WarmTaker;
  rootDisk: RootDiskDriver;
  dataDir: string;
  nowMs: () => number;
  logger: Logger;
}

const AT_ONCE = 4;

interface Work extends FetchTools {
  snapshot: StoredSnapshot;
  request: FetchRequest;
  progress: ProgressLog;
}

export async function fetchSnapshot(
  snapshot: StoredSnapshot,
  request: FetchRequest,
  tools: FetchTools,
  signal: AbortSignal,
): Promise<SnapshotRecord> {
  const { image, memory, layers } = snapshot;
  const ids = layerIdsOfChain(image.disk, layers);
  await request.claim(ids);
  const totalBytes = await missingBytes(snapshot, ids, request, tools, signal);
  await request.makeRoom(totalBytes);
  const progress = progressLog(tools.logger, "fetching a snapshot", { snapshotId: snapshot.id, totalBytes });
  const work: Work = { ...tools, snapshot, request, progress };
  const warm = await fetchWarmImage(work, signal);
  const chain = await fetchLayers(work, ids, warm, signal);
  await removeTree(request.layerDir); // of an attempt that a crash cut off
  await fetchFiles(work, memory.files, request.layerDir, signal);
  progress.end({});
  const shared = new Set(snapshot.warm.layers.map((one) => one.sha256));
  const own = [...layers, ...Object.values(memory.files)].filter((one) => !shared.has(one.sha256));
  return {
    version: 1,
    id: snapshot.id,
    teamId: snapshot.teamId,
    sourceSandboxId: snapshot.sourceSandboxId,
    machineId: snapshot.machineId,
    createdAtMs: snapshot.createdAtMs,
    warmKey: warm.key,
    vcpus: snapshot.vcpus,
    memoryMb: snapshot.memoryMb,
    diskMb: snapshot.diskMb,
    chain,
    layer: { pageBytes: memory.pageBytes, allocatedBytes: memory.allocatedBytes },
    sizeBytes: snapshot.sizeBytes,
    compat: snapshot.compat,
    imported: { atMs: tools.nowMs(), bytes: own.reduce((sum, one) => sum + one.dataBytes, 0) },
  };
}

/** What is yet to come, as far as a look can tell. */
async function missingBytes(
  { image, warm, memory, layers, ...rest }: StoredSnapshot,
  ids: readonly LayerId[],
  { layersDir }: FetchRequest,
  { images, warmImages }: FetchTools,
  signal: AbortSignal,
): Promise<number> {
  const key = fetchedWarmKey({ image, warm, memory, layers, ...rest });
  const missing: Content[] = Object.values(memory.files);
  if ((await warmImages.open(key, signal)) === undefined) {
    missing.push(...Object.values(warm.files), ...warm.layers);
    const isHere =
      (await images.has(image.disk)) || (await images.ownPath(image.hash, image.disk, signal)) !== undefined;
    if (!isHere) missing.push(image.disk);
  }
  for (const [index, id] of ids.entries()) {
    if (!(await exists(join(layersDir, id)))) missing.push(layers[index]!);
  }
  return missing.reduce((sum, one) => sum + one.dataBytes, 0);
}

async function fetchWarmImage(work: Work, signal: AbortSignal): Promise<WarmImage> {
  const { snapshot, images, warmImages, rootDisk, nowMs, progress } = work;
  const { image, warm, vcpus, memoryMb } = snapshot;
  const key = fetchedWarmKey(snapshot);
  const known = await warmImages.open(key, signal);
  if (known !== undefined) return known;
  const diskPath =
    (await images.ownPath(image.hash, image.disk, signal)) ??
    (await images.fetch(image.disk, signal, (bytes) => progress.add(bytes)));
  const fill = async (dir: string, filling: AbortSignal): Promise<WarmManifest> => {
    await fetchFiles(work, warm.files, dir, filling);
    const below: DiskLayer[] = [{ kind: "image", path: diskPath, format: "raw" }];
    const [content] = warm.layers;
    const [layerId] = layerIdsOfChain(image.disk, warm.layers);
    if (content === undefined || layerId === undefined) throw new Error("a warm image without a disk layer");
    const layersDir = join(dir, "disk");
    await mkdir(layersDir, { mode: 0o700 });
    await fetchLayer(work, { content, layerId, layersDir, below }, filling);
    await syncDirectory(dir);
    const { fingerprint } = warm.memory;
    return {
      version: 1,
      key,
      image: { name: image.name, hash: image.hash, diskPath },
      shape: { vcpus, memoryMb },
      memory: { sha256: warm.memory.sha256, deviceStateSha256: warm.memory.deviceStateSha256, fingerprint },
      disk: { layerId, file: `disk/${layerId}/disk.qcow2`, sizeBytes: warm.diskSizeBytes },
      allocatedBytes: [...Object.values(warm.files), content].reduce((sum, one) => sum + one.dataBytes, 0),
      builtAt: new Date(nowMs()).toISOString(),
    };
  };
  if (rootDisk.adoptLayer === undefined) throw new Error("this root disk driver shares no snapshots");
  return await warmImages.takeIn(key, fill, signal);
}

/** The snapshot's chain on this host. What it has in common with its warm image's is the warm image's. */
async function fetchLayers(
  work: Work,
  ids: readonly LayerId[],
  warm: WarmImage,
  signal: AbortSignal,
): Promise<DiskLayer[]> {
  const { snapshot, request } = work;
  const [image] = warm.diskChain;
  if (image?.kind !== "image") throw new Error("a warm image's chain begins with an image");
  const chain: DiskLayer[] = [image];
  for (const [index, content] of snapshot.layers.entries()) {
    const layerId = ids[index]!;
    const shared = warm.diskChain[index + 1];
    const isShared = shared?.kind === "layer" && shared.id === layerId;
    const { layersDir } = request;
    chain.push(
      isShared ? shared : await fetchLayer(work, { content, layerId, layersDir, below: [...chain] }, signal),
    );
  }
  return chain;
}

async function fetchLayer(
  { blobs, layersAtWork, rootDisk, progress, dataDir }: Work,
  layer: { content: Content; layerId: LayerId; layersDir: string; below: readonly DiskLayer[] },
  signal: AbortSignal,
): Promise<DiskLayer> {
  const { content, layerId, layersDir, below } = layer;
  return await layersAtWork.run(layerId, async () => {
    // Beside the parts, whose leftovers go by age; a layer that is there already is kept as it is.
    const file = join(dataDir, "store", "parts", `${layerId}.layer`);
    try {
      if (!(await exists(join(layersDir, layerId)))) {
        await rm(file, { force: true });
        await blobs.fetch(content, file, signal, (bytes) => progress.add(bytes));
      }
      return await rootDisk.adoptLayer!({ file, layerId, layersDir, below }, signal);
    } finally {
      await rm(file, { force: true });
    }
  });
}

async function fetchFiles(
  { blobs, progress }: Work,
  files: Readonly<Record<string, Content>>,
  dir: string,
  signal: AbortSignal,
): Promise<void> {
  await mkdir(dir, { recursive: true, mode: 0o711 });
  const atOnce = pLimit(AT_ONCE);
  const fetches = Object.entries(files).map(([name, content]) =>
    atOnce(() => blobs.fetch(content, join(dir, name), signal, (bytes) => progress.add(bytes))),
  );
  await Promise.allSettled(fetches); // nobody writes there any more when it is taken back
  await Promise.all(fetches);
  await syncDirectory(dir);
}

async function exists(path: string): Promise<boolean> {
  try {
    await stat(path);
    return true;
  } catch (cause) {
    if (isErrno(cause, "ENOENT")) return false;
    throw cause;
  }
}
