/**
 * A cold-booted, frozen guest's memory becomes a base on disk: its pages that
 * are not empty, packed, with an index, the device state and a manifest.
 */
import { mapLargeBuffer } from "../../host/ffi.ts";
import type { Memfd } from "../../host/memfd.ts";
import type { MemoryBase, VmShape } from "../vmm.ts";
import { memoryBytesOf } from "./memory-base.ts";
import { HashedFile, memorySha256, writeManifest } from "./manifest.ts";
import { writeOne } from "./memory-layer.ts";
import { encodeIndex, PAGE_BYTES, pushPages, type PageRange } from "./page-index.ts";

/** Reading and looking through so much takes some milliseconds. */
const PIECE_BYTES = 8 << 20;

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
  const zero = Buffer.alloc(PAGE_BYTES);
  const piece = mapLargeBuffer(PIECE_BYTES);
  try {
    await using pagesFile = await HashedFile.create(dir, "pages");
    for (let at = 0; at < memoryBytes; at += PIECE_BYTES) {
      signal.throwIfAborted();
      const bytes = Math.min(PIECE_BYTES, memoryBytes - at);
      guest.memory.readInto(piece.bytes, bytes, at);
      // What is not empty moves together at the piece's beginning.
      let kept = 0;
      for (let from = 0; from < bytes; from += PAGE_BYTES) {
        if (piece.bytes.compare(zero, 0, PAGE_BYTES, from, from + PAGE_BYTES) === 0) continue;
        if (from !== kept) piece.bytes.copyWithin(kept, from, from + PAGE_BYTES);
        kept += PAGE_BYTES;
        pushPages(ranges, (at + from) / PAGE_BYTES, 1, "data");
      }
      await pagesFile.write(piece.bytes.subarray(0, kept));
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
    piece.unmap();
  }
}
