/**
 * Memory layers: taken from a frozen clone, written, and loaded into a waiting one.
 *
 * A layer is the whole difference from the base, never from another layer:
 * pages that were loaded from an older layer are private pages again.
 *
 * A capture holds its pages in memory up to IN_MEMORY_BYTES; what is more goes
 * to an unlinked file, so that a guest that dirtied gigabytes costs disk, not
 * the agent's memory.
 */
import { constants } from "node:fs";
import { open, unlink, type FileHandle } from "node:fs/promises";
import { join } from "node:path";
import type { MemoryBase, LayerCapture, MemoryLayer, VmShape } from "../vmm.ts";
import type { LoadedBase } from "./memory-base.ts";
import { MAX_DEVICE_STATE_BYTES, MAX_INDEX_BYTES } from "./memory-base.ts";
import {
  allocatedBytes,
  HashedFile,
  layerManifestSchema,
  mismatch,
  openVerified,
  readFully,
  readManifest,
  readVerified,
  writeManifest,
  type LayerManifest,
} from "./manifest.ts";
import {
  dataBytes,
  decodeIndex,
  encodeIndex,
  PAGE_BYTES,
  type PageIndex,
  type PageRange,
} from "./page-index.ts";
import {
  copyPagesIn,
  copyPagesOut,
  findPrivatePages,
  groupRanges,
  keepDifferences,
  type MemoryPiece,
} from "./private-pages.ts";

const IN_MEMORY_BYTES = 128 << 20;
const GROUP_PAGES = (16 << 20) / PAGE_BYTES;

/** A capture that nobody writes (its operation failed meanwhile) gives its file back when it is collected. */
const abandonedSpills = new FinalizationRegistry<FileHandle>((spill) => void spill.close());

/** The pages of a capture, in index order. */
class PageStore implements AsyncDisposable {
  readonly #spillDir: string;
  readonly #inMemory: Buffer[] = [];
  #inMemoryBytes = 0;
  #spill: FileHandle | undefined;
  #spilledBytes = 0;

  constructor(spillDir: string) {
    this.#spillDir = spillDir;
  }

  async add(pages: Buffer): Promise<void> {
    if (this.#spill === undefined && this.#inMemoryBytes + pages.length <= IN_MEMORY_BYTES) {
      this.#inMemory.push(pages);
      this.#inMemoryBytes += pages.length;
      return;
    }
    if (this.#spill === undefined) {
      this.#spill = await openUnlinked(this.#spillDir);
      abandonedSpills.register(this, this.#spill, this);
    }
    await this.#spill.write(pages, 0, pages.length, this.#spilledBytes);
    this.#spilledBytes += pages.length;
  }

  async *read(): AsyncGenerator<Buffer> {
    yield* this.#inMemory;
    for (let at = 0; at < this.#spilledBytes; at += GROUP_PAGES * PAGE_BYTES) {
      if (this.#spill === undefined) throw new Error("unreachable: spilled bytes without a file");
      const piece = Buffer.allocUnsafeSlow(Math.min(GROUP_PAGES * PAGE_BYTES, this.#spilledBytes - at));
      await readFully(this.#spill, piece, piece.length, at, "spilled pages");
      yield piece;
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#inMemory.length = 0;
    const spill = this.#spill;
    this.#spill = undefined;
    abandonedSpills.unregister(this);
    await spill?.close();
  }
}

/** A file that goes with its handle, whatever becomes of us. */
async function openUnlinked(dir: string): Promise<FileHandle> {
  const path = join(dir, "pages.spill");
  const flags = constants.O_RDWR | constants.O_CREAT | constants.O_TRUNC | constants.O_NOFOLLOW;
  const handle = await open(path, flags, 0o600);
  await unlink(path);
  return handle;
}

export interface FrozenMemory {
  pid: number;
  memory: readonly MemoryPiece[];
  base: LoadedBase;
  deviceSections: Buffer;
  /** Where a large capture spills: not writable by the VMM. */
  spillDir: string;
}

/** Copies the difference out of a frozen VM. */
export async function captureMemoryLayer(frozen: FrozenMemory, signal: AbortSignal): Promise<LayerCapture> {
  const { pid, memory, base } = frozen;
  const store = new PageStore(frozen.spillDir);
  try {
    const kept: PageRange[] = [];
    const own = await findPrivatePages(pid, memory, signal);
    for (const group of groupRanges(own, GROUP_PAGES)) {
      const pages = group.reduce((sum, range) => sum + range.pages, 0);
      const copy = Buffer.allocUnsafeSlow(pages * PAGE_BYTES);
      await copyPagesOut(pid, memory, group, copy, signal);
      const keptBytes = await keepDifferences(group, copy, base.bytes, kept);
      if (keptBytes > 0) await store.add(copy.subarray(0, keptBytes));
    }
    const index = { memoryBytes: base.memoryBytes, ranges: kept };
    return new CapturedLayer(index, store, frozen.deviceSections, base.base);
  } catch (cause) {
    await store[Symbol.asyncDispose]();
    throw cause;
  }
}

class CapturedLayer implements LayerCapture {
  readonly pageBytes: number;
  readonly #index: PageIndex;
  readonly #store: PageStore;
  readonly #deviceSections: Buffer;
  readonly #base: MemoryBase;

  constructor(index: PageIndex, store: PageStore, deviceSections: Buffer, base: MemoryBase) {
    this.pageBytes = dataBytes(index);
    this.#index = index;
    this.#store = store;
    this.#deviceSections = deviceSections;
    this.#base = base;
  }

  /** Once: the capture's pages are given back when it ends, however it ends. */
  async writeTo(dir: string, signal: AbortSignal): Promise<MemoryLayer> {
    await using store = this.#store;
    const [index, deviceState, pages] = await Promise.all([
      writeOne(dir, "index", encodeIndex(this.#index)),
      writeOne(dir, "device.state", this.#deviceSections),
      writePages(dir, store, signal),
    ]);
    signal.throwIfAborted();
    const manifest: LayerManifest = {
      version: 1,
      kind: "memory-layer",
      fingerprint: this.#base.fingerprint,
      shape: this.#base.shape,
      base: {
        memorySha256: this.#base.memorySha256,
        deviceStateSha256: this.#base.deviceStateSha256,
      },
      files: { index, pages, "device.state": deviceState },
    };
    await writeManifest(dir, manifest);
    return { dir, pageBytes: this.pageBytes, allocatedBytes: await allocatedBytes(dir) };
  }
}

async function writePages(
  dir: string,
  store: PageStore,
  signal: AbortSignal,
): Promise<{ sha256: string; bytes: number }> {
  await using file = await HashedFile.create(dir, "pages");
  for await (const piece of store.read()) {
    signal.throwIfAborted();
    await file.write(piece);
  }
  return file.finish();
}

export async function writeOne(
  dir: string,
  name: "index" | "device.state",
  content: Buffer,
): Promise<{ sha256: string; bytes: number }> {
  await using file = await HashedFile.create(dir, name);
  await file.write(content);
  return file.finish();
}

/** A layer that was found whole and to belong to `base`; nothing of it is loaded yet. */
export class VerifiedLayer implements AsyncDisposable {
  readonly deviceSections: Buffer;
  readonly #index: PageIndex;
  readonly #pages: FileHandle;

  private constructor(index: PageIndex, pages: FileHandle, deviceSections: Buffer) {
    this.#index = index;
    this.#pages = pages;
    this.deviceSections = deviceSections;
  }

  static async open(
    dir: string,
    base: MemoryBase,
    fingerprint: string,
    signal: AbortSignal,
  ): Promise<VerifiedLayer> {
    const manifest = await readManifest(dir, layerManifestSchema);
    if (manifest.fingerprint !== fingerprint)
      throw mismatch("the layer", "it was made by another VMM or on another CPU");
    if (
      manifest.base.memorySha256 !== base.memorySha256 ||
      manifest.base.deviceStateSha256 !== base.deviceStateSha256 ||
      !sameShape(manifest.shape, base.shape)
    ) {
      throw mismatch("the layer", "it is of another warm image");
    }
    const { files } = manifest;
    const encoded = await readVerified(dir, "index", files.index, MAX_INDEX_BYTES);
    const index = decodeIndex(encoded, base.shape.memoryMb * 1024 * 1024);
    if (dataBytes(index) !== files.pages.bytes) throw mismatch("pages", "they are not what the index says");
    const sections = await readVerified(dir, "device.state", files["device.state"], MAX_DEVICE_STATE_BYTES);
    return new VerifiedLayer(index, await openVerified(dir, "pages", files.pages, signal), sections);
  }

  /** Makes the pages the process's own. */
  async loadInto(pid: number, memory: readonly MemoryPiece[], signal: AbortSignal): Promise<void> {
    let position = 0;
    for (const group of groupRanges(this.#index.ranges, GROUP_PAGES)) {
      const data = group.filter((range) => range.kind === "data");
      const zero = group.filter((range) => range.kind === "zero");
      const bytes = data.reduce((sum, range) => sum + range.pages * PAGE_BYTES, 0);
      if (bytes > 0) {
        const pages = Buffer.allocUnsafeSlow(bytes);
        await readFully(this.#pages, pages, bytes, position, "pages");
        position += bytes;
        await copyPagesIn(pid, memory, data, pages, signal);
      }
      const zeroBytes = zero.reduce((sum, range) => sum + range.pages * PAGE_BYTES, 0);
      if (zeroBytes > 0) await copyPagesIn(pid, memory, zero, Buffer.alloc(zeroBytes), signal);
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#pages.close();
  }
}

function sameShape(a: VmShape, b: VmShape): boolean {
  return a.vcpus === b.vcpus && a.memoryMb === b.memoryMb;
}
