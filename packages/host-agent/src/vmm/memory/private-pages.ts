/**
 * A clone's own pages: found, copied out, and put in, from outside of its process.
 *
 * The guest's memory is a private mapping of its base, so a page that the guest
 * (or the agent) wrote is anonymous memory, and all others are the base's file
 * pages. `/proc/PID/pagemap` tells them apart: present or swapped, and not of a
 * file (bit 61). (Linux Documentation/admin-guide/mm/pagemap.rst)
 *
 * The process may be hostile. Nothing read from it is trusted beyond being
 * bytes: addresses come from the kernel's own tables, sizes are checked.
 */
import { open, readFile } from "node:fs/promises";
import { setImmediate as yieldToOthers } from "node:timers/promises";
import { readProcessMemory, writeProcessMemory, type RemoteRange } from "../../host/ffi.ts";
import { PAGE_BYTES, pushPages, type PageRange } from "./page-index.ts";

/** A piece of the guest's memory in the VMM's address space. */
export interface MemoryPiece {
  address: number;
  bytes: number;
  /** Where in the guest's memory file it begins. */
  offset: number;
}

/** `/proc/PID/maps` of a VMM has some hundred lines. */
const MAX_MAPS_BYTES = 4 << 20;

/**
 * Where the memory file is mapped, in file order. Throws unless the pieces are
 * together exactly the whole file, each once.
 */
export async function findMemory(
  pid: number,
  file: { dev: string; ino: string },
  memoryBytes: number,
): Promise<MemoryPiece[]> {
  const maps = await readFile(`/proc/${pid}/maps`, "utf8");
  if (maps.length > MAX_MAPS_BYTES) throw new Error("the VMM's memory map is too long");
  const pieces: MemoryPiece[] = [];
  for (const line of maps.split("\n")) {
    // start-end perms offset dev inode path; the device's numbers are of st_dev.
    const match = /^([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) /.exec(line);
    if (match === null || match[6] !== file.ino) continue;
    if (makeDevice(parseInt(`${match[4]}`, 16), parseInt(`${match[5]}`, 16)) !== BigInt(file.dev)) continue;
    const [start, end, offset] = [match[1], match[2], match[3]].map((hex) => parseInt(`${hex}`, 16));
    if (start === undefined || end === undefined || offset === undefined) continue;
    pieces.push({ address: start, bytes: end - start, offset });
  }
  pieces.sort((a, b) => a.offset - b.offset);
  let end = 0;
  for (const piece of pieces) {
    if (piece.offset !== end) break;
    end += piece.bytes;
  }
  if (end !== memoryBytes || pieces.reduce((sum, piece) => sum + piece.bytes, 0) !== memoryBytes) {
    throw new Error("the VMM does not map the guest's memory as it did when it was started");
  }
  return pieces;
}

/** glibc's gnu_dev_makedev. */
function makeDevice(major: number, minor: number): bigint {
  const [a, b] = [BigInt(major), BigInt(minor)];
  return ((a & 0xfffff000n) << 32n) | ((a & 0xfffn) << 8n) | ((b & 0xffffff00n) << 12n) | (b & 0xffn);
}

/** Entries of 8 bytes; bits 63 (present), 62 (swapped) and 61 (of a file) are in the last byte. */
const ENTRY_BYTES = 8;
const PRESENT_OR_SWAPPED = 0xc0;
const OF_A_FILE = 0x20;
const SCAN_CHUNK_BYTES = 1 << 20;

/** The pages that are the process's own, in order. All are of kind "data". */
export async function findPrivatePages(
  pid: number,
  memory: readonly MemoryPiece[],
  signal: AbortSignal,
): Promise<PageRange[]> {
  const ranges: PageRange[] = [];
  const chunk = Buffer.allocUnsafeSlow(SCAN_CHUNK_BYTES);
  await using pagemap = await open(`/proc/${pid}/pagemap`, "r");
  for (const piece of memory) {
    const totalBytes = (piece.bytes / PAGE_BYTES) * ENTRY_BYTES;
    const position = (piece.address / PAGE_BYTES) * ENTRY_BYTES;
    let done = 0;
    while (done < totalBytes) {
      signal.throwIfAborted();
      const wanted = Math.min(chunk.length, totalBytes - done);
      const { bytesRead } = await pagemap.read(chunk, 0, wanted, position + done);
      if (bytesRead === 0 || bytesRead % ENTRY_BYTES !== 0) throw new Error("the page map ended early");
      const firstPage = piece.offset / PAGE_BYTES + done / ENTRY_BYTES;
      let runStart = -1;
      const entries = bytesRead / ENTRY_BYTES;
      for (let entry = 0; entry < entries; entry += 1) {
        const flags = chunk[entry * ENTRY_BYTES + 7] ?? 0;
        const own = (flags & PRESENT_OR_SWAPPED) !== 0 && (flags & OF_A_FILE) === 0;
        if (own && runStart < 0) runStart = entry;
        else if (!own && runStart >= 0) {
          pushPages(ranges, firstPage + runStart, entry - runStart, "data");
          runStart = -1;
        }
      }
      if (runStart >= 0) pushPages(ranges, firstPage + runStart, entries - runStart, "data");
      done += bytesRead;
    }
  }
  return ranges;
}

/** The ranges as addresses in the VMM. A range may span pieces. */
function* remoteRanges(memory: readonly MemoryPiece[], ranges: Iterable<PageRange>): Generator<RemoteRange> {
  for (const range of ranges) {
    let offset = range.firstPage * PAGE_BYTES;
    let left = range.pages * PAGE_BYTES;
    while (left > 0) {
      const at = offset;
      const piece = memory.find((each) => at >= each.offset && at < each.offset + each.bytes);
      if (piece === undefined) throw new RangeError("a page outside of the guest's memory");
      const bytes = Math.min(left, piece.offset + piece.bytes - offset);
      yield { address: piece.address + offset - piece.offset, bytes };
      offset += bytes;
      left -= bytes;
    }
  }
}

/** Splits ranges into groups of at most `maxPages`, cutting long ones. */
export function* groupRanges(ranges: Iterable<PageRange>, maxPages: number): Generator<PageRange[]> {
  let group: PageRange[] = [];
  let pages = 0;
  for (const range of ranges) {
    let { firstPage, pages: left } = range;
    while (left > 0) {
      const taken = Math.min(left, maxPages - pages);
      group.push({ firstPage, pages: taken, kind: range.kind });
      firstPage += taken;
      left -= taken;
      pages += taken;
      if (pages === maxPages) {
        yield group;
        group = [];
        pages = 0;
      }
    }
  }
  if (group.length > 0) yield group;
}

/** Copies the ranges, one after the other, into `into`. */
export function copyPagesOut(
  pid: number,
  memory: readonly MemoryPiece[],
  ranges: readonly PageRange[],
  into: Buffer,
  signal: AbortSignal,
): Promise<void> {
  return readProcessMemory(pid, [...remoteRanges(memory, ranges)], into, signal);
}

/** Fills the ranges, one after the other, from `from`. */
export function copyPagesIn(
  pid: number,
  memory: readonly MemoryPiece[],
  ranges: readonly PageRange[],
  from: Buffer,
  signal: AbortSignal,
): Promise<void> {
  return writeProcessMemory(pid, [...remoteRanges(memory, ranges)], from, signal);
}

const ZERO_PAGE = Buffer.alloc(PAGE_BYTES);
/** So many comparisons take about a millisecond. */
const PAGES_BETWEEN_YIELDS = 2048;

/**
 * What of copied-out pages is worth keeping: pages that equal the base's are
 * dropped, empty ones become `zero`. `pages` is compacted in place; the kept
 * ranges are pushed to `kept`. Returns the bytes that stay.
 */
export async function keepDifferences(
  ranges: readonly PageRange[],
  pages: Buffer,
  base: Buffer,
  kept: PageRange[],
): Promise<number> {
  let from = 0;
  let to = 0;
  let compared = 0;
  for (const range of ranges) {
    for (let page = range.firstPage; page < range.firstPage + range.pages; page += 1) {
      const bytes = pages.subarray(from, from + PAGE_BYTES);
      const offset = page * PAGE_BYTES;
      if (base.compare(bytes, 0, PAGE_BYTES, offset, offset + PAGE_BYTES) !== 0) {
        const isZero = bytes.equals(ZERO_PAGE);
        pushPages(kept, page, 1, isZero ? "zero" : "data");
        if (!isZero) {
          if (to !== from) bytes.copy(pages, to);
          to += PAGE_BYTES;
        }
      }
      from += PAGE_BYTES;
      compared += 1;
      if (compared % PAGES_BETWEEN_YIELDS === 0) await yieldToOthers();
    }
  }
  return to;
}
