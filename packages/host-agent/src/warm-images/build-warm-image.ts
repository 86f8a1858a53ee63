/**
 * Makes one warm image: boot, prime, freeze, save memory and disk.
 *
 * Everything lies in a build directory, which becomes the warm image by one
 * rename; a crash leaves that directory and a place, both of which the next
 * start of the agent takes away.
 */
import { mkdir, open, readdir, rename, stat } from "node:fs/promises";
import { dirname, join, relative } from "node:path";
import { RookeryError } from "@rookery/protocol/errors";
import { removeTree, syncDirectory, writeFileAtomic } from "../host/atomic-file.ts";
import type { LayerId, WarmKey } from "../ids.ts";
import { guestNetworkArgs } from "../image/cmdline.ts";
import type { GuestImage } from "../image/guest-image.ts";
import type { GuestNetworkDriver } from "../guest-network/guest-network.ts";
import type { RootDisk, RootDiskDriver } from "../root-disk/root-disk.ts";
import type { MemoryBase, Vm, VmmDriver, VmPlace, VmShape } from "../vmm/vmm.ts";
import { primeGuest, type WarmGuest } from "./prime-guest.ts";
import { readWarmImage, WARM_MANIFEST, type StoredWarmImage, type WarmManifest } from "./warm-manifest.ts";

/** A place for the VMM that is booted for a build: the vm-pool's to make and to take away. */
export interface PlaceMaker {
  make(shape: VmShape, signal: AbortSignal): Promise<BuildPlace>;
}

export interface BuildPlace {
  vm: VmPlace;
  envd: { host: string; port: number };
  /** Journals the VMM's process, so that an agent that is started again finds it. */
  record(vm: Vm): Promise<void>;
  /** Takes the place away; its VM has ended, and its disk is detached. Bears running twice. */
  release(): Promise<void>;
}

export interface BuildTools {
  vmm: VmmDriver;
  rootDisk: RootDiskDriver;
  network: Pick<GuestNetworkDriver, "addressing">;
  guest: WarmGuest;
  places: PlaceMaker;
  nowMs(): number;
  randomBytes(count: number): Uint8Array;
  onProgress(event: WarmProgress): void;
}

export interface WarmProgress {
  key: WarmKey;
  image: string;
  shape: VmShape;
  step: "boot" | "prime" | "save" | "ready";
  message: string;
}

export interface BuildRequest {
  key: WarmKey;
  image: GuestImage;
  shape: VmShape;
  /** DATA/warm */
  warmDir: string;
}

/** A guest boots in 3 s on an idle host, and in a minute on one that does much else. */
const BOOT_TIMEOUT_MS = 180_000;
const PRIME_TIMEOUT_MS = 300_000;
const UNDO_TIMEOUT_MS = 60_000;

export const BUILD_PREFIX = ".build-";

export async function buildWarmImage(
  request: BuildRequest,
  tools: BuildTools,
  signal: AbortSignal,
): Promise<StoredWarmImage> {
  const { key, warmDir } = request;
  const warm = await fillWarmImage(warmDir, key, (dir) => bootAndSave(request, dir, tools, signal));
  tools.onProgress({ ...progressOf(request), step: "ready", message: "the warm image is ready" });
  return warm;
}

/** What `fill` writes into a directory becomes the warm image `key`, as a whole and durably, or nothing. */
export async function fillWarmImage(
  warmDir: string,
  key: WarmKey,
  fill: (dir: string) => Promise<WarmManifest>,
): Promise<StoredWarmImage> {
  const buildDir = join(warmDir, `${BUILD_PREFIX}${key}`);
  await removeTree(buildDir);
  await mkdir(buildDir, { recursive: true, mode: 0o700 });
  try {
    const manifest = await fill(buildDir);
    await writeFileAtomic(join(buildDir, WARM_MANIFEST), `${JSON.stringify(manifest, undefined, 2)}\n`);
    const dir = join(warmDir, key);
    await removeTree(dir);
    await rename(buildDir, dir);
    await syncDirectory(warmDir);
    return await readWarmImage(dir);
  } catch (cause) {
    await removeTree(buildDir);
    throw cause;
  }
}

function progressOf({ key, image, shape }: BuildRequest): Pick<WarmProgress, "key" | "image" | "shape"> {
  return { key, image: image.name, shape };
}

async function bootAndSave(
  request: BuildRequest,
  buildDir: string,
  tools: BuildTools,
  signal: AbortSignal,
): Promise<WarmManifest> {
  const { image, shape } = request;
  const { rootDisk, places, vmm } = tools;
  const place = await places.make(shape, signal);
  // What outlives this function is undone in reverse order, also when `signal` has aborted.
  await using undo = new AsyncDisposableStack();
  undo.defer(() => place.release());

  const disk = await rootDisk.create(
    {
      dir: join(buildDir, "root"),
      chain: [{ kind: "image", path: image.rootDisk.path, format: image.rootDisk.format }],
      sizeBytes: image.rootDisk.sizeBytes,
    },
    signal,
  );
  undo.defer(() => rootDisk.detach(disk, place.vm, AbortSignal.timeout(UNDO_TIMEOUT_MS)));
  const attachment = await rootDisk.attach(disk, place.vm, signal);
  const progress = progressOf(request);
  tools.onProgress({ ...progress, step: "boot", message: "booting the guest" });
  const boot = {
    kernel: image.kernel,
    initrd: image.initrd,
    cmdline: `${image.cmdline} ${guestNetworkArgs(tools.network.addressing)}`,
  };
  const vm = await vmm.boot({ place: place.vm, shape, boot, disk: attachment }, signal);
  undo.defer(() => vm.kill());
  await place.record(vm);
  await warmUp(vm, place, request, tools, signal);

  tools.onProgress({ ...progress, step: "save", message: "saving its memory" });
  await vm.freeze(signal);
  const memory = await vm.saveBase(buildDir, signal);
  // The disk's last writer is gone before its top becomes a layer.
  await vm.kill();
  await rootDisk.detach(disk, place.vm, signal);
  return manifestOf(request, memory, await freezeDisk(disk, buildDir, tools, signal), buildDir, tools);
}

/** Waits for the booted guest and primes it; a guest that ends meanwhile says why. */
async function warmUp(
  vm: Vm,
  place: BuildPlace,
  request: BuildRequest,
  tools: BuildTools,
  signal: AbortSignal,
): Promise<void> {
  const { guest } = tools;
  const ended = new AbortController();
  void vm.exited.then((exit) =>
    ended.abort(new RookeryError("guest_error", `The template's guest ended: ${exit.message}`)),
  );
  const within = (ms: number): AbortSignal =>
    AbortSignal.any([signal, ended.signal, AbortSignal.timeout(ms)]);
  try {
    await guest.waitHealthy(place.envd, within(BOOT_TIMEOUT_MS));
    tools.onProgress({ ...progressOf(request), step: "prime", message: "warming it up" });
    const priming = {
      guest,
      nowMs: () => tools.nowMs(),
      randomHex: (bytes: number) => Buffer.from(tools.randomBytes(bytes)).toString("hex"),
      randomBase64: (bytes: number) => Buffer.from(tools.randomBytes(bytes)).toString("base64"),
    };
    await primeGuest(place.envd, priming, within(PRIME_TIMEOUT_MS));
  } catch (cause) {
    if (ended.signal.aborted) throw ended.signal.reason;
    signal.throwIfAborted();
    if (cause instanceof RookeryError) throw cause;
    throw new RookeryError("guest_error", "The template's guest did not get ready.", { cause });
  } finally {
    await guest.release(place.envd);
  }
}

/** The disk's top becomes a layer in the build directory; the rest of the disk goes. */
async function freezeDisk(
  disk: RootDisk,
  buildDir: string,
  tools: BuildTools,
  signal: AbortSignal,
): Promise<RootDisk> {
  const { rootDisk } = tools;
  const layerId = `ly${Buffer.from(tools.randomBytes(8)).toString("hex")}` as LayerId;
  await rootDisk.prepareNextTop(disk, undefined, signal);
  const layersDir = join(buildDir, "disk");
  await mkdir(layersDir, { mode: 0o700 });
  const committed = await rootDisk.commitNextTop(disk, { layerId, layersDir }, signal);
  await rootDisk.remove(disk.dir);
  return committed;
}

async function manifestOf(
  { key, image, shape }: BuildRequest,
  memory: MemoryBase,
  disk: RootDisk,
  buildDir: string,
  tools: BuildTools,
): Promise<WarmManifest> {
  const layer = disk.chain.at(-1);
  if (layer?.kind !== "layer") throw new Error("a committed disk ends with a layer");
  await syncPath(layer.path);
  await syncDirectory(dirname(layer.path));
  return {
    version: 1,
    key,
    image: { name: image.name, hash: image.hash, diskPath: image.rootDisk.path },
    shape,
    memory: {
      sha256: memory.memorySha256,
      deviceStateSha256: memory.deviceStateSha256,
      fingerprint: memory.fingerprint,
    },
    disk: { layerId: layer.id, file: relative(buildDir, layer.path), sizeBytes: disk.sizeBytes },
    allocatedBytes: await allocatedBytesBelow(buildDir),
    builtAt: new Date(tools.nowMs()).toISOString(),
  };
}

async function syncPath(path: string): Promise<void> {
  await using file = await open(path, "r");
  await file.sync();
}

async function allocatedBytesBelow(dir: string): Promise<number> {
  const entries = await readdir(dir, { recursive: true, withFileTypes: true });
  const files = entries.filter((entry) => entry.isFile());
  const stats = await Promise.all(files.map((entry) => stat(join(entry.parentPath, entry.name))));
  return stats.reduce((sum, each) => sum + each.blocks * 512, 0);
}
