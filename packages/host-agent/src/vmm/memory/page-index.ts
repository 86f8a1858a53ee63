/**
 * The index of a page file: which pages of a guest's memory it holds, in order.
 *
 * A page file has the bytes of the `data` ranges, one after the other; `zero`
 * ranges have none. Ranges ascend and never overlap. The same form serves a
 * memory base (difference from empty memory) and a layer (difference from a base).
 *
 * On disk: magic, u32 page size, u32 number of ranges, u64 memory bytes, then
 * per range u32 first page, u32 pages (top bit: zero). Little-endian.
 */

export const PAGE_BYTES = 4096;
const MAGIC = Buffer.from("RKPGIDX1");
const HEADER_BYTES = 24;
const RANGE_BYTES = 8;
const ZERO_BIT = 0x8000_0000;
/** So that page numbers fit 31 bits; far above any guest of ours. */
export const MAX_MEMORY_BYTES = 1024 * 1024 * 1024 * 1024;

export interface PageRange {
  firstPage: number;
  pages: number;
  kind: "data" | "zero";
}

export interface PageIndex {
  memoryBytes: number;
  ranges: readonly PageRange[];
}

/** Appends a page, joined to the last range where they touch and are alike. */
export function pushPages(
  ranges: PageRange[],
  firstPage: number,
  pages: number,
  kind: PageRange["kind"],
): void {
  const last = ranges.at(-1);
  if (last !== undefined && last.kind === kind && last.firstPage + last.pages === firstPage)
    last.pages += pages;
  else ranges.push({ firstPage, pages, kind });
}

/** Bytes of the page file that belongs to the index. */
export function dataBytes(index: PageIndex): number {
  return index.ranges.reduce((sum, range) => sum + (range.kind === "data" ? range.pages * PAGE_BYTES : 0), 0);
}

export function encodeIndex(index: PageIndex): Buffer {
  const encoded = Buffer.allocUnsafeSlow(HEADER_BYTES + index.ranges.length * RANGE_BYTES);
  MAGIC.copy(encoded, 0);
  encoded.writeUInt32LE(PAGE_BYTES, 8);
  encoded.writeUInt32LE(index.ranges.length, 12);
  encoded.writeBigUInt64LE(BigInt(index.memoryBytes), 16);
  let at = HEADER_BYTES;
  for (const range of index.ranges) {
    encoded.writeUInt32LE(range.firstPage, at);
    encoded.writeUInt32LE(range.kind === "zero" ? (range.pages | ZERO_BIT) >>> 0 : range.pages, at + 4);
    at += RANGE_BYTES;
  }
  return encoded;
}

/** Throws when it is not an index of a memory of this size, or breaks an invariant. */
export function decodeIndex(encoded: Buffer, expectedMemoryBytes: number): PageIndex {
  const fail = (why: string): never => {
    throw new Error(`page index: ${why}`);
  };
  if (encoded.length < HEADER_BYTES || !encoded.subarray(0, MAGIC.length).equals(MAGIC)) fail("no index");
  if (encoded.readUInt32LE(8) !== PAGE_BYTES) fail("another page size");
  const count = encoded.readUInt32LE(12);
  if (encoded.length !== HEADER_BYTES + count * RANGE_BYTES) fail("wrong length");
  const memoryBytes = Number(encoded.readBigUInt64LE(16));
  if (memoryBytes !== expectedMemoryBytes || memoryBytes > MAX_MEMORY_BYTES) fail("another memory size");
  const totalPages = memoryBytes / PAGE_BYTES;
  const ranges: PageRange[] = [];
  let end = 0;
  for (let at = HEADER_BYTES; at < encoded.length; at += RANGE_BYTES) {
    const firstPage = encoded.readUInt32LE(at);
    const word = encoded.readUInt32LE(at + 4);
    const pages = (word & ~ZERO_BIT) >>> 0;
    if (pages === 0 || firstPage < end || firstPage + pages > totalPages)
      fail("ranges out of order or bounds");
    end = firstPage + pages;
    ranges.push({ firstPage, pages, kind: word >= ZERO_BIT ? "zero" : "data" });
  }
  return { memoryBytes, ranges };
}
