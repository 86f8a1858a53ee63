/**
 * Bases in memory: what clones map privately.
 *
 * A base is copied once per agent into a memfd, which is then sealed: the VMMs,
 * each under a uid of its own, must open it for writing (QEMU 7.2 always does),
 * yet none can change what the others see. It counts as long as any VMM maps
 * it; the agent's own descriptor is dropped with the least recently used base.
 *
 * After an agent's restart the memfd of a base is found again in a live VMM.
 */
import { createHash } from "node:crypto";
import { ftruncateSync } from "node:fs";
import { isLoadable } from "@rookery/protocol/memory-compat";
import { isSealedAgainstChange, mapFileForReading, type Mapping } from "../../host/ffi.ts";
import { Memfd } from "../../host/memfd.ts";
import type { MemoryBase, VmShape } from "../vmm.ts";
import {
  baseManifestSchema,
  memorySha256,
  mismatch,
  openSized,
  readFully,
  readManifest,
  readVerified,
} from "./manifest.ts";
import { dataBytes, decodeIndex, PAGE_BYTES } from "./page-index.ts";
import { groupRanges } from "./private-pages.ts";

/** An index has 8 bytes a range: enough for any guest whose pages alternate up to 16 GiB. */
export const MAX_INDEX_BYTES = 32 << 20;
/** Devices alone: 20 to 100 KB. */
export const MAX_DEVICE_STATE_BYTES = 16 << 20;
/** Each pins a guest's worth of memory. */
const MAX_BASES = 8;
/** 1 MiB. */
const COPY_PAGES = 256;

export interface DeviceStream {
  /** Loads a clone as the base was. */
  whole: Buffer;
  /** What a layer's device sections are put behind. */
  memoryPrefix: Buffer;
}

/** A base's memory and device state, verified. Counted: whoever was given one releases it. */
export class LoadedBase {
  readonly base: MemoryBase;
  readonly memfd: Memfd;
  readonly stream: DeviceStream;
  #mapping: Mapping | undefined;
  #users = 1;

  constructor(base: MemoryBase, memfd: Memfd, stream: DeviceStream) {
    this.base = base;
    this.memfd = memfd;
    this.stream = stream;
  }

  get memoryBytes(): number {
    return memoryBytesOf(this.base.shape);
  }

  /** The base's bytes, for comparison. Not to be touched after `release`: they are unmapped then. */
  get bytes(): Buffer {
    if (this.#users === 0) throw new Error("a released base");
    this.#mapping ??= mapFileForReading(this.memfd.fd, this.memoryBytes);
    return this.#mapping.bytes;
  }

  retain(): this {
    if (this.#users === 0) throw new Error("a released base");
    this.#users += 1;
    return this;
  }

  release(): void {
    this.#users -= 1;
    if (this.#users > 0) return;
    this.#mapping?.unmap();
    this.#mapping = undefined;
    this.memfd[Symbol.dispose]();
  }
}

export function memoryBytesOf(shape: VmShape): number {
  return shape.memoryMb * 1024 * 1024;
}

export class MemoryBases {
  /** By hash; the least recently used one first. */
  readonly #loaded = new Map<string, Promise<LoadedBase>>();

  /** The base, loaded if need be, retained for the caller. */
  async acquire(base: MemoryBase, signal: AbortSignal): Promise<LoadedBase> {
    const key = `${base.memorySha256} ${base.deviceStateSha256}`;
    signal.throwIfAborted();
    const known = this.#loaded.get(key);
    // Not under the caller's signal: others may wait for the same load.
    const loading = known ?? loadBase(base);
    this.#loaded.delete(key);
    this.#loaded.set(key, loading);
    try {
      const loaded = (await loading).retain();
      await this.#dropOldest();
      return loaded;
    } catch (cause) {
      if (this.#loaded.get(key) === loading) this.#loaded.delete(key);
      throw cause;
    }
  }

  /** Takes the base's memory from a VMM that maps it. Undefined: it holds no such file. */
  async adopt(
    base: MemoryBase,
    pid: number,
    identity: { dev: string; ino: string },
  ): Promise<LoadedBase | undefined> {
    const key = `${base.memorySha256} ${base.deviceStateSha256}`;
    const known = await this.#loaded.get(key)?.catch(() => undefined);
    if (known !== undefined && sameFile(known.memfd.identity, identity)) return known.retain();
    const memfd = await Memfd.openFromProcess(pid, identity);
    if (memfd === undefined) return undefined;
    try {
      // The number of a file can come again; a sealed file of the right size was ours, and is as it was.
      if (!isSealedAgainstChange(memfd.fd) || memfd.sizeBytes() !== memoryBytesOf(base.shape)) {
        memfd[Symbol.dispose]();
        return undefined;
      }
      const loaded = new LoadedBase(base, memfd, await readStream(base));
      if (!this.#loaded.has(key)) this.#loaded.set(key, Promise.resolve(loaded.retain()));
      return loaded;
    } catch (cause) {
      memfd[Symbol.dispose]();
      throw cause;
    }
  }

  async close(): Promise<void> {
    const all = [...this.#loaded.values()];
    this.#loaded.clear();
    for (const loading of all) {
      const loaded = await loading.catch(() => undefined);
      loaded?.release();
    }
  }

  async #dropOldest(): Promise<void> {
    while (this.#loaded.size > MAX_BASES) {
      const [oldest] = this.#loaded;
      if (oldest === undefined) return;
      this.#loaded.delete(oldest[0]);
      (await oldest[1].catch(() => undefined))?.release();
    }
  }
}

function sameFile(a: { dev: string; ino: string }, b: { dev: string; ino: string }): boolean {
  return a.dev === b.dev && a.ino === b.ino;
}

async function checkedManifest(base: MemoryBase) {
  const manifest = await readManifest(base.dir, baseManifestSchema);
  if (
    !isLoadable(manifest.fingerprint, base.fingerprint) ||
    manifest.shape.vcpus !== base.shape.vcpus ||
    manifest.shape.memoryMb !== base.shape.memoryMb ||
    memorySha256(manifest.files) !== base.memorySha256 ||
    manifest.files["device.state"].sha256 !== base.deviceStateSha256
  ) {
    throw mismatch("the base's manifest", "it is of another base");
  }
  return manifest;
}

async function readStream(base: MemoryBase): Promise<DeviceStream> {
  const manifest = await checkedManifest(base);
  const whole = await readVerified(
    base.dir,
    "device.state",
    manifest.files["device.state"],
    MAX_DEVICE_STATE_BYTES,
  );
  return { whole, memoryPrefix: whole.subarray(0, manifest.memoryPrefixBytes) };
}

async function loadBase(base: MemoryBase): Promise<LoadedBase> {
  const manifest = await checkedManifest(base);
  const stream = await readStream(base);
  const memoryBytes = memoryBytesOf(base.shape);
  const encoded = await readVerified(base.dir, "index", manifest.files.index, MAX_INDEX_BYTES);
  const index = decodeIndex(encoded, memoryBytes);
  if (dataBytes(index) !== manifest.files.pages.bytes)
    throw mismatch("pages", "they are not what the index says");

  const memfd = Memfd.create("rookery-base");
  try {
    ftruncateSync(memfd.fd, memoryBytes);
    // Copied and hashed in one pass: nobody else sees the file before its seal.
    const hash = createHash("sha256");
    await using pages = await openSized(base.dir, "pages", manifest.files.pages);
    // By write(2): touching each page of a mapping takes several times as long.
    const piece = Buffer.allocUnsafeSlow(COPY_PAGES * PAGE_BYTES);
    let position = 0;
    const data = index.ranges.filter((range) => range.kind === "data");
    for (const group of groupRanges(data, COPY_PAGES)) {
      const bytes = group.reduce((sum, range) => sum + range.pages * PAGE_BYTES, 0);
      await readFully(pages, piece, bytes, position, "pages");
      hash.update(piece.subarray(0, bytes));
      position += bytes;
      let from = 0;
      for (const range of group) {
        const end = from + range.pages * PAGE_BYTES;
        memfd.write(piece.subarray(from, end), range.firstPage * PAGE_BYTES);
        from = end;
      }
    }
    if (hash.digest("hex") !== manifest.files.pages.sha256) throw mismatch("pages", "its hash is wrong");
    memfd.seal();
    return new LoadedBase(base, memfd, stream);
  } catch (cause) {
    memfd[Symbol.dispose]();
    throw cause;
  }
}
