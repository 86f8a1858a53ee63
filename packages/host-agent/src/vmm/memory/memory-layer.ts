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
import { isLoadable } from "@rookery/protocol/memory-compat";
import { mapLargeBuffer, type Mapping } from "../../host/ffi.ts";
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
const SPILL_PIECE_BYTES = 1 << 20;

/** What a capture holds beyond the heap. */
interface Held {
  mappings: Mapping[];
  spill: FileHandle | undefined;
}

async function giveBack(held: Held): Promise<void> {
  for (const mapping of held.mappings.splice(0)) mapping.unmap();
  const { spill } = held;
  held.spill = undefined;
  await spill?.close();
}

/** A capture that nobody writes (its operation failed meanwhile) gives all back when it is collected. */
const abandoned = new FinalizationRegistry<Held>((held) => void giveBack(held));

/** The pages of a capture, in index order. */
class PageStore implements AsyncDisposable {
  readonly #spillDir: string;
  readonly #held: Held = { mappings: [], spill: undefined };
  readonly #inMemory: Buffer[] = [];
  #inMemoryBytes = 0;
  #spilledBytes = 0;

  constructor(spillDir: string) {
    this.#spillDir = spillDir;
    abandoned.register(this, this.#held, this);
  }

  /** Takes the mapping over; the first `keptBytes` of it are pages to keep. */
  async add(mapping: Mapping, keptBytes: number): Promise<void> {
    this.#held.mappings.push(mapping);
    const pages = mapping.bytes.subarray(0, keptBytes);
    if (this.#held.spill === undefined && this.#inMemoryBytes + pages.length <= IN_MEMORY_BYTES) {
      this.#inMemory.push(pages);
      this.#inMemoryBytes += pages.length;
      return;
    }
    this.#held.spill ??= await openUnlinked(this.#spillDir);
    await writeFully(this.#held.spill, pages, this.#spilledBytes);
    this.#spilledBytes += pages.length;
    this.#held.mappings.pop();
    mapping.unmap();
  }

  /** Pieces in order; one is valid until the next is asked for. */
  async *read(): AsyncGenerator<Buffer> {
    yield* this.#inMemory;
    const { spill } = this.#held;
    if (spill === undefined) return;
    const piece = Buffer.allocUnsafeSlow(SPILL_PIECE_BYTES);
    for (let at = 0; at < this.#spilledBytes; at += piece.length) {
      const bytes = Math.min(piece.length, this.#spilledBytes - at);
      await readFully(spill, piece, bytes, at, "spilled pages");
      yield piece.subarray(0, bytes);
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    abandoned.unregister(this);
    this.#inMemory.length = 0;
    await giveBack(this.#held);
  }
}

async function writeFully(file: FileHandle, bytes: Buffer, position: number): Promise<void> {
  let done = 0;
  while (done < bytes.length) {
    done += (await file.write(bytes, done, bytes.length - done, position + done)).bytesWritten;
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
      let keptBytes: number;
      const copy = mapLargeBuffer(pages * PAGE_BYTES);
      try {
        await copyPagesOut(pid, memory, group, copy.bytes, signal);
        keptBytes = await keepDifferences(group, copy.bytes, base.bytes, kept);
      } catch (cause) {
        copy.unmap();
        throw cause;
      }
      await store.add(copy, keptBytes);
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
    const writing = [
      writeOne(dir, "index", encodeIndex(this.#index)),
      writeOne(dir, "device.state", this.#deviceSections),
      writePages(dir, store, signal),
    ] as const;
    // Also after a failure nothing reads the pages any more when they are given back.
    await Promise.allSettled(writing);
    const [index, deviceState, pages] = await Promise.all(writing);
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
    if (!isLoadable(manifest.fingerprint, fingerprint))
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
        const pages = mapLargeBuffer(bytes);
        try {
          await readFully(this.#pages, pages.bytes, bytes, position, "pages");
          await copyPagesIn(pid, memory, data, pages.bytes, signal);
        } finally {
          pages.unmap();
        }
        position += bytes;
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
