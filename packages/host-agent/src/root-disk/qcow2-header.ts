/**
 * The first bytes of a qcow2 file (docs/interop/qcow2.txt of QEMU), read before
 * any tool of ours opens it.
 *
 * A VMM owns its top while it runs and may have left anything in it: a header
 * can name other files of the host as backing or data file, which a tool run by
 * root would then read. So only what our own tops look like is let through.
 */
import { constants } from "node:fs";
import { open } from "node:fs/promises";

const MAGIC = 0x514649fb;
const MIN_HEADER_BYTES = 104;
/** Backing file names end at 1023 bytes; header and extensions come before. */
const MAX_READ_BYTES = 4096;
/** "dirty" and "corrupt" say how it was left; all others change how it is read: external data file, compression, … */
const ALLOWED_INCOMPATIBLE = 0b11n;

export interface Qcow2Header {
  /** As a guest sees it. */
  sizeBytes: number;
  /** Undefined: none. */
  backingFile: string | undefined;
}

/** Throws when `path` is no regular file, or no qcow2 file of the plain kind that we make. */
export async function readQcow2Header(path: string): Promise<Qcow2Header> {
  await using file = await open(path, constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK);
  if (!(await file.stat()).isFile()) throw new Error(`${path}: is not a regular file`);
  const buffer = Buffer.alloc(MAX_READ_BYTES);
  const { bytesRead } = await file.read(buffer, 0, MAX_READ_BYTES, 0);
  try {
    return parseQcow2Header(buffer.subarray(0, bytesRead));
  } catch (cause) {
    throw new Error(`${path}: ${cause instanceof Error ? cause.message : String(cause)}`, { cause });
  }
}

export function parseQcow2Header(bytes: Buffer): Qcow2Header {
  if (bytes.length < MIN_HEADER_BYTES || bytes.readUInt32BE(0) !== MAGIC) throw new Error("is no qcow2 file");
  const version = bytes.readUInt32BE(4);
  if (version !== 3) throw new Error(`is qcow2 of version ${version}, not 3`);
  const sizeBytes = bytes.readBigUInt64BE(24);
  if (sizeBytes > BigInt(Number.MAX_SAFE_INTEGER)) throw new Error(`claims to hold ${sizeBytes} bytes`);
  if (bytes.readUInt32BE(32) !== 0) throw new Error("is encrypted");
  if (bytes.readUInt32BE(60) !== 0) throw new Error("has internal snapshots");
  const unexpected = bytes.readBigUInt64BE(72) & ~ALLOWED_INCOMPATIBLE;
  if (unexpected !== 0n) throw new Error(`has incompatible features 0x${unexpected.toString(16)}`);
  const nameOffset = bytes.readBigUInt64BE(8);
  const nameLength = bytes.readUInt32BE(16);
  if (nameOffset === 0n) return { sizeBytes: Number(sizeBytes), backingFile: undefined };
  if (nameOffset + BigInt(nameLength) > BigInt(bytes.length)) {
    throw new Error("keeps the name of its backing file where we do not");
  }
  const name = bytes.subarray(Number(nameOffset), Number(nameOffset) + nameLength).toString("utf8");
  return { sizeBytes: Number(sizeBytes), backingFile: name };
}
