/**
 * A file as a stream that leaves out what is empty: a root disk of 4 GiB with
 * 350 MiB on it is 350 MiB to hash, send and write.
 *
 *   "RKSPRS1\n", u64 size, then per block of 64 KiB that is not all zero:
 *   u64 offset, u32 length, its bytes; at the end u64 2^64 - 1. Little-endian.
 *
 * Invariant: a content has one stream, however its holes lie, so the stream's
 * hash names the content. What is read comes from other hosts: every number in
 * it is checked, and no more is written than was asked for.
 */
import { createHash } from "node:crypto";
import { constants } from "node:fs";
import { open } from "node:fs/promises";
import { nextDataExtent } from "../host/ffi.ts";

const MAGIC = Buffer.from("RKSPRS1\n");
const HEADER_BYTES = 16;
const RECORD_BYTES = 12;
const END = 0xffff_ffff_ffff_ffffn;
const END_BYTES = 8;
const BLOCK_BYTES = 64 << 10;
const PIECE_BYTES = 16 * BLOCK_BYTES;
const ZERO_BLOCK = Buffer.alloc(BLOCK_BYTES);

/** What a content is known by. */
export interface ContentRef {
  /** Of its stream. */
  sha256: string;
  /** Of the file, holes included. */
  bytes: number;
  /** About what it takes on a disk: of its stream, but for beginning and end. */
  dataBytes: number;
}

export async function* readSparse(path: string, signal: AbortSignal): AsyncGenerator<Buffer, void> {
  await using file = await open(path, constants.O_RDONLY | constants.O_NOFOLLOW);
  const { size } = await file.stat();
  const header = Buffer.alloc(HEADER_BYTES);
  MAGIC.copy(header);
  header.writeBigUInt64LE(BigInt(size), MAGIC.length);
  yield header;
  for (let at = 0; at < size;) {
    const extent = nextDataExtent(file.fd, at);
    if (extent === undefined) break;
    const start = Math.max(at, extent.start - (extent.start % BLOCK_BYTES));
    const end = Math.min(size, Math.ceil(extent.end / BLOCK_BYTES) * BLOCK_BYTES);
    for (let from = start; from < end; from += PIECE_BYTES) {
      signal.throwIfAborted();
      const piece = Buffer.allocUnsafeSlow(Math.min(PIECE_BYTES, end - from));
      for (let done = 0; done < piece.length;) {
        const { bytesRead } = await file.read(piece, done, piece.length - done, from + done);
        if (bytesRead === 0) throw new Error(`${path} became shorter while it was read`);
        done += bytesRead;
      }
      yield* packBlocks(piece, from);
    }
    at = Math.max(end, at + 1);
  }
  const tail = Buffer.alloc(END_BYTES);
  tail.writeBigUInt64LE(END);
  yield tail;
}

function* packBlocks(piece: Buffer, offset: number): Generator<Buffer> {
  const parts: Buffer[] = [];
  for (let at = 0; at < piece.length; at += BLOCK_BYTES) {
    const block = piece.subarray(at, at + BLOCK_BYTES);
    if (block.equals(ZERO_BLOCK.subarray(0, block.length))) continue;
    const record = Buffer.alloc(RECORD_BYTES);
    record.writeBigUInt64LE(BigInt(offset + at));
    record.writeUInt32LE(block.length, 8);
    parts.push(record, block);
  }
  if (parts.length > 0) yield Buffer.concat(parts);
}

export async function contentRefOf(path: string, signal: AbortSignal): Promise<ContentRef> {
  const hash = createHash("sha256");
  let [bytes, streamBytes] = [0, 0];
  for await (const piece of readSparse(path, signal)) {
    if (streamBytes === 0) bytes = Number(piece.readBigUInt64LE(MAGIC.length));
    streamBytes += piece.length;
    hash.update(piece);
  }
  return { sha256: hash.digest("hex"), bytes, dataBytes: streamBytes - HEADER_BYTES - END_BYTES };
}

/**
 * Writes what a stream says into a new file, durably. Throws `Damaged` when the
 * stream is not the one of `expected`; the file is then worth nothing.
 */
export async function writeSparse(
  path: string,
  stream: AsyncIterable<Uint8Array>,
  expected: ContentRef,
  signal: AbortSignal,
): Promise<void> {
  const hash = createHash("sha256");
  const flags = constants.O_WRONLY | constants.O_CREAT | constants.O_EXCL | constants.O_NOFOLLOW;
  await using file = await open(path, flags, 0o600);
  await file.truncate(expected.bytes);
  const reader = new RecordReader(expected.bytes);
  for await (const piece of stream) {
    signal.throwIfAborted();
    hash.update(piece);
    for (const { offset, block } of reader.take(piece)) {
      for (let done = 0; done < block.length;) {
        done += (await file.write(block, done, block.length - done, offset + done)).bytesWritten;
      }
    }
  }
  reader.finish();
  if (hash.digest("hex") !== expected.sha256) throw new Damaged("its hash is wrong");
  await file.sync();
}

/** What was read is not what it should be: the copy is bad, not the way to it. */
export class Damaged extends Error {}

/** Cuts a stream into blocks; holds at most one record and one piece. */
class RecordReader {
  readonly #sizeBytes: number;
  #held: Uint8Array[] = [];
  #heldBytes = 0;
  /** With fewer nothing can be said. */
  #wantedBytes = HEADER_BYTES;
  #hasHeader = false;
  #hasEnded = false;
  #nextOffset = 0;

  constructor(sizeBytes: number) {
    this.#sizeBytes = sizeBytes;
  }

  *take(piece: Uint8Array): Generator<{ offset: number; block: Buffer }> {
    this.#held.push(piece);
    this.#heldBytes += piece.length;
    if (this.#heldBytes < this.#wantedBytes) return;
    const bytes = Buffer.concat(this.#held);
    let at = 0;
    if (!this.#hasHeader) {
      const fits = bytes.subarray(0, MAGIC.length).equals(MAGIC);
      if (!fits || bytes.readBigUInt64LE(MAGIC.length) !== BigInt(this.#sizeBytes)) {
        throw new Damaged("it is another file");
      }
      this.#hasHeader = true;
      at = HEADER_BYTES;
    }
    this.#wantedBytes = END_BYTES;
    while (bytes.length - at >= END_BYTES) {
      if (this.#hasEnded) throw new Damaged("it goes on after its end");
      const position = bytes.readBigUInt64LE(at);
      if (position === END) {
        this.#hasEnded = true;
        at += END_BYTES;
        continue;
      }
      this.#wantedBytes = RECORD_BYTES;
      if (bytes.length - at < this.#wantedBytes) break;
      const length = bytes.readUInt32LE(at + 8);
      const offset = this.#check(position, length);
      this.#wantedBytes += length;
      if (bytes.length - at < this.#wantedBytes) break;
      at += RECORD_BYTES;
      yield { offset, block: bytes.subarray(at, at + length) };
      at += length;
      this.#nextOffset = offset + BLOCK_BYTES;
      this.#wantedBytes = END_BYTES;
    }
    this.#held = [bytes.subarray(at)];
    this.#heldBytes = bytes.length - at;
  }

  finish(): void {
    if (!this.#hasEnded || this.#heldBytes > 0) throw new Damaged("it ends early");
  }

  #check(position: bigint, length: number): number {
    const offset = Number(position);
    const isRight =
      position < BigInt(this.#sizeBytes) &&
      offset % BLOCK_BYTES === 0 &&
      offset >= this.#nextOffset &&
      length === Math.min(BLOCK_BYTES, this.#sizeBytes - offset);
    if (!isRight) throw new Damaged("its blocks are out of order or bounds");
    return offset;
  }
}
