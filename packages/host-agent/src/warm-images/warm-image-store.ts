/**
 * The warm images of one data directory: found by their key, built on first
 * use, once for all who ask at the same time, and kept by a budget of disk.
 *
 * What a caller was given stays for as long as `inUse` names it (a sandbox or
 * snapshot refers to it) or a build or a pool holds it; others go, the longest
 * unused first, when the budget is exceeded.
 */
import { createHash } from "node:crypto";
import { mkdir, readdir } from "node:fs/promises";
import { join } from "node:path";
import { RookeryError } from "@rookery/protocol/errors";
import { removeTree } from "../host/atomic-file.ts";
import { isErrno } from "../host/errno.ts";
import type { WarmKey } from "../ids.ts";
import type { GuestImage } from "../image/guest-image.ts";
import type { ImageStore } from "../image/image-store.ts";
import { shareWork } from "../image/share-work.ts";
import type { GuestNetworkDriver } from "../guest-network/guest-network.ts";
import type { WarmImage, WarmImages } from "../sandbox-manager/warm-images.ts";
import type { VmShape } from "../vmm/vmm.ts";
import {
  BUILD_PREFIX,
  buildWarmImage,
  fillWarmImage,
  type BuildTools,
  type WarmProgress,
} from "./build-warm-image.ts";
import { PRIMING_VERSION } from "./prime-guest.ts";
import { readWarmImage, type StoredWarmImage, type WarmManifest } from "./warm-manifest.ts";

export interface WarmImageStoreOptions extends Omit<BuildTools, "onProgress" | "network"> {
  dataDir: string;
  images: Pick<ImageStore, "ensure">;
  network: Pick<GuestNetworkDriver, "addressing" | "kind">;
  /** Warm images beyond those in use may take so much. */
  budgetBytes: number;
  /** Those that a sandbox, a snapshot or the pool refers to now. */
  inUse(): ReadonlySet<WarmKey>;
  onProgress?: (event: WarmProgress) => void;
}

const KEY = /^[0-9a-f]{64}$/;
/** What the guest kernel and its programs need to come up at all. */
const LEAST_MEMORY_MB = 256;
const MOST_VCPUS = 64;
/** Who was given one has this long until a journal says so. */
const GRACE_MS = 10 * 60_000;

export class WarmImageStore implements WarmImages {
  readonly #options: WarmImageStoreOptions;
  readonly #dir: string;
  readonly #known = new Map<WarmKey, StoredWarmImage>();
  readonly #lastUsedMs = new Map<WarmKey, number>();
  /** By image and shape: looking an image up anew for each sandbox would be slow. */
  readonly #current = new Map<string, { image: string; key: WarmKey }>();
  readonly #build: (name: string, signal: AbortSignal) => Promise<WarmImage>;
  readonly #takeIn: (key: string, signal: AbortSignal) => Promise<WarmImage>;
  readonly #fills = new Map<string, (dir: string, signal: AbortSignal) => Promise<WarmManifest>>();
  /** What the names of builds stand for. */
  readonly #asked = new Map<string, { image: string; shape: VmShape }>();

  private constructor(options: WarmImageStoreOptions) {
    this.#options = options;
    this.#dir = join(options.dataDir, "warm");
    this.#build = shareWork((name, signal) => this.#findOrBuild(name, signal));
    this.#takeIn = shareWork(async (key, signal) => {
      const fill = this.#fills.get(key);
      if (fill === undefined) throw new Error("a warm image that nobody fills");
      const warm = await fillWarmImage(this.#dir, key as WarmKey, (dir) => fill(dir, signal));
      this.#known.set(warm.key, warm);
      this.#use(warm);
      this.#fills.delete(key);
      await this.evict();
      return warm;
    });
  }

  /** Takes away what a build of a former agent left, and learns what there is. */
  static async open(options: WarmImageStoreOptions): Promise<WarmImageStore> {
    const store = new WarmImageStore(options);
    await mkdir(store.#dir, { recursive: true, mode: 0o711 });
    for (const name of await readdir(store.#dir)) {
      if (name.startsWith(BUILD_PREFIX)) await removeTree(join(store.#dir, name));
      else if (KEY.test(name)) await store.#load(name as WarmKey);
    }
    return store;
  }

  async ensure(image: string, shape: VmShape, signal: AbortSignal): Promise<WarmImage> {
    checkShape(shape);
    const name = `${shape.vcpus} ${shape.memoryMb} ${image}`;
    const current = this.#current.get(name);
    const known = current === undefined ? undefined : this.#known.get(current.key);
    if (known !== undefined) return this.#use(known);
    this.#asked.set(name, { image, shape });
    return await this.#build(name, signal);
  }

  async open(key: WarmKey, signal: AbortSignal): Promise<WarmImage | undefined> {
    signal.throwIfAborted();
    if (!KEY.test(key)) return undefined;
    const known = this.#known.get(key) ?? (await this.#load(key));
    return known === undefined ? undefined : this.#use(known);
  }

  /**
   * Takes in one that another host made: `fill` writes its files and gives back
   * its manifest; once for all who ask at the same time.
   */
  async takeIn(
    key: WarmKey,
    fill: (dir: string, signal: AbortSignal) => Promise<WarmManifest>,
    signal: AbortSignal,
  ): Promise<WarmImage> {
    const known = await this.open(key, signal);
    if (known !== undefined) return known;
    this.#fills.set(key, fill);
    return await this.#takeIn(key, signal);
  }

  /** Looks the image up anew at the next `ensure`: it was built again. */
  forget(image: string): void {
    for (const [name, current] of this.#current) {
      if (current.image === image) this.#current.delete(name);
    }
  }

  list(): StoredWarmImage[] {
    return [...this.#known.values()];
  }

  /** Removes what exceeds the budget and nothing uses. Gives back the keys of what went. */
  async evict(): Promise<WarmKey[]> {
    const { budgetBytes } = this.#options;
    const used = this.#options.inUse();
    const nowMs = this.#options.nowMs();
    const spare = [...this.#known.values()]
      .filter((warm) => !used.has(warm.key) && nowMs - this.#lastUse(warm) > GRACE_MS)
      .toSorted((a, b) => this.#lastUse(b) - this.#lastUse(a));
    const removed: WarmKey[] = [];
    let total = 0;
    for (const warm of spare) {
      total += warm.allocatedBytes;
      if (total <= budgetBytes) continue;
      if (this.#options.inUse().has(warm.key)) continue; // since the removal before this one began
      // Forgotten first: nobody is given what is about to go.
      this.#known.delete(warm.key);
      this.#lastUsedMs.delete(warm.key);
      await removeTree(warm.dir);
      removed.push(warm.key);
    }
    return removed;
  }

  #lastUse({ key, builtAtMs }: StoredWarmImage): number {
    return this.#lastUsedMs.get(key) ?? builtAtMs;
  }

  #use(warm: StoredWarmImage): WarmImage {
    this.#lastUsedMs.set(warm.key, this.#options.nowMs());
    return warm;
  }

  async #load(key: WarmKey): Promise<StoredWarmImage | undefined> {
    try {
      const warm = await readWarmImage(join(this.#dir, key));
      this.#known.set(key, warm);
      return warm;
    } catch (cause) {
      if (isErrno(cause, "ENOENT")) return undefined;
      throw cause;
    }
  }

  async #findOrBuild(name: string, signal: AbortSignal): Promise<WarmImage> {
    const asked = this.#asked.get(name);
    if (asked === undefined) throw new Error("a build that nobody asked for");
    const { shape } = asked;
    const image = await this.#options.images.ensure(asked.image, signal);
    const key = await this.#keyOf(image, shape, signal);
    let warm = this.#known.get(key) ?? (await this.#load(key));
    if (warm === undefined) {
      const { onProgress = () => undefined } = this.#options;
      warm = await buildWarmImage(
        { key, image, shape, warmDir: this.#dir },
        { ...this.#options, onProgress },
        signal,
      );
      this.#known.set(key, warm);
    }
    this.#current.set(name, { image: asked.image, key });
    this.#use(warm);
    await this.evict();
    return warm;
  }

  /** Everything that the frozen guest's memory, devices and disk depend on. */
  async #keyOf(image: GuestImage, shape: VmShape, signal: AbortSignal): Promise<WarmKey> {
    const { vmm, rootDisk, network } = this.#options;
    const inputs = [
      // Kernel, initrd, envd and the disk are the image's inputs.
      ["image", image.hash],
      ["cmdline", image.cmdline],
      ["disk", image.rootDisk.sizeBytes, rootDisk.kind],
      ["shape", shape.vcpus, shape.memoryMb],
      ["vmm", vmm.kind, await vmm.fingerprint(signal)],
      ["network", network.kind, network.addressing],
      ["priming", PRIMING_VERSION],
    ];
    return createHash("sha256").update(JSON.stringify(inputs)).digest("hex") as WarmKey;
  }
}

function checkShape({ vcpus, memoryMb }: VmShape): void {
  const fits =
    Number.isSafeInteger(vcpus) &&
    vcpus >= 1 &&
    vcpus <= MOST_VCPUS &&
    Number.isSafeInteger(memoryMb) &&
    memoryMb >= LEAST_MEMORY_MB;
  if (fits) return;
  throw new RookeryError(
    "unsupported_shape",
    `A sandbox has 1 to ${MOST_VCPUS} vCPUs and at least ${LEAST_MEMORY_MB} MB of memory.`,
  );
}
