/**
 * A cold-booted, frozen guest's memory becomes a base on disk: its pages that
 * are not empty, packed, with an index, the device state and a manifest.
 */
import { setImmediate as yieldToOthers } from "node:timers/promises";
import { mapFileForReading } from "../../host/ffi.ts";
import type { Memfd } from "../../host/memfd.ts";
import type { MemoryBase, VmShape } from "../vmm.ts";
import { memoryBytesOf } from "./memory-base.ts";
import { HashedFile, memorySha256, writeManifest } from "./manifest.ts";
import { writeOne } from "./memory-layer.ts";
import { encodeIndex, PAGE_BYTES, pushPages, type PageRange } from "./page-index.ts";

/** A scan of so many pages takes about 2 ms. */
const PIECE_PAGES = 4096;

export interface FrozenGuest {
  dir: string;
  memory: Memfd;
  shape: VmShape;
  fingerprint: string;
  stream: Buffer;
  memoryPrefixBytes: number;
}

export async function saveMemoryBase(guest: FrozenGuest, signal: AbortSignal): Promise<MemoryBase> {
  const { dir, shape, fingerprint } = guest;
  const memoryBytes = memoryBytesOf(shape);
  if (guest.memory.sizeBytes() !== memoryBytes) throw new Error("the guest's memory has another size");
  const ranges: PageRange[] = [];
  const mapping = mapFileForReading(guest.memory.fd, memoryBytes);
  try {
    await using pagesFile = await HashedFile.create(dir, "pages");
    const zero = Buffer.alloc(PAGE_BYTES);
    const totalPages = memoryBytes / PAGE_BYTES;
    for (let piece = 0; piece < totalPages; piece += PIECE_PAGES) {
      signal.throwIfAborted();
      const found: PageRange[] = [];
      const end = Math.min(totalPages, piece + PIECE_PAGES);
      for (let page = piece; page < end; page += 1) {
        const at = page * PAGE_BYTES;
        if (mapping.bytes.compare(zero, 0, PAGE_BYTES, at, at + PAGE_BYTES) !== 0)
          pushPages(found, page, 1, "data");
      }
      for (const { firstPage, pages } of found) {
        const at = firstPage * PAGE_BYTES;
        await pagesFile.write(mapping.bytes.subarray(at, at + pages * PAGE_BYTES));
        pushPages(ranges, firstPage, pages, "data");
      }
      await yieldToOthers();
    }
    const [pages, index, deviceState] = await Promise.all([
      pagesFile.finish(),
      writeOne(dir, "index", encodeIndex({ memoryBytes, ranges })),
      writeOne(dir, "device.state", guest.stream),
    ]);
    const files = { pages, index, "device.state": deviceState };
    await writeManifest(dir, {
      version: 1,
      kind: "memory-base",
      fingerprint,
      shape,
      files,
      memoryPrefixBytes: guest.memoryPrefixBytes,
    });
    return {
      dir,
      shape,
      fingerprint,
      memorySha256: memorySha256(files),
      deviceStateSha256: deviceState.sha256,
    };
  } finally {
    mapping.unmap();
  }
}
