/**
 * Manifests of memory bases and memory layers, and the files that they vouch for.
 *
 * Invariant: a manifest is written last (fsync, rename), so a directory without
 * one is unfinished; nothing of a directory is used before the hashes in its
 * manifest have been found right.
 */
import { createHash, type Hash } from "node:crypto";
import { constants } from "node:fs";
import { mkdir, open, stat, type FileHandle } from "node:fs/promises";
import { join } from "node:path";
import { RookeryError } from "@rookery/protocol/errors";
import { z } from "zod";
import { readJson, syncDirectory, writeFileAtomic } from "../../host/atomic-file.ts";
import { isErrno } from "../../host/errno.ts";

const sha256 = z.string().regex(/^[0-9a-f]{64}$/);
const file = z.object({ sha256, bytes: z.number().int().nonnegative() });
const shape = z.object({ vcpus: z.number().int().positive(), memoryMb: z.number().int().positive() });

export const baseManifestSchema = z.object({
  version: z.literal(1),
  kind: z.literal("memory-base"),
  fingerprint: z.string(),
  shape,
  files: z.object({ index: file, pages: file, "device.state": file }),
  /** Bytes of the device state stream before its first device section. */
  memoryPrefixBytes: z.number().int().positive(),
});
export type BaseManifest = z.output<typeof baseManifestSchema>;

export const layerManifestSchema = z.object({
  version: z.literal(1),
  kind: z.literal("memory-layer"),
  fingerprint: z.string(),
  shape,
  /** The base that the pages differ from. */
  base: z.object({ memorySha256: sha256, deviceStateSha256: sha256 }),
  files: z.object({ index: file, pages: file, "device.state": file }),
});
export type LayerManifest = z.output<typeof layerManifestSchema>;

/** Names of the files, of a base and of a layer alike. */
export const MEMORY_FILES = {
  index: "memory.index",
  pages: "memory.pages",
  "device.state": "device.state",
} as const;
export type MemoryFile = keyof typeof MEMORY_FILES;
export type MemoryFiles = BaseManifest["files"];

const MANIFEST = "memory.json";

export function memoryFilePath(dir: string, name: MemoryFile): string {
  return join(dir, MEMORY_FILES[name]);
}

/** Commits a directory whose files are written. */
export async function writeManifest(dir: string, manifest: BaseManifest | LayerManifest): Promise<void> {
  await syncDirectory(dir);
  await writeFileAtomic(join(dir, MANIFEST), `${JSON.stringify(manifest, undefined, 2)}\n`);
}

export async function readManifest<T>(dir: string, schema: z.ZodType<T>): Promise<T> {
  try {
    return await readJson(join(dir, MANIFEST), schema);
  } catch (cause) {
    if (isErrno(cause, "ENOENT"))
      throw new RookeryError("host_error", "The memory image is incomplete.", { cause });
    throw new RookeryError("host_error", "The memory image's manifest is not valid.", { cause });
  }
}

/** SHA-256 of a base's memory: over its index and then its pages. */
export function memorySha256(files: MemoryFiles): string {
  return createHash("sha256").update(files.index.sha256).update(files.pages.sha256).digest("hex");
}

/** One new file: bytes are hashed as they are written, and durable once `finish` has returned. */
export class HashedFile implements AsyncDisposable {
  readonly #handle: FileHandle;
  readonly #hash: Hash = createHash("sha256");
  #bytes = 0;

  private constructor(handle: FileHandle) {
    this.#handle = handle;
  }

  /** Replaces what an earlier, failed attempt has left. */
  static async create(dir: string, name: MemoryFile): Promise<HashedFile> {
    await mkdir(dir, { recursive: true, mode: 0o700 });
    const flags = constants.O_WRONLY | constants.O_CREAT | constants.O_TRUNC | constants.O_NOFOLLOW;
    return new HashedFile(await open(memoryFilePath(dir, name), flags, 0o600));
  }

  async write(bytes: Uint8Array): Promise<void> {
    const writing = this.#handle.writeFile(bytes);
    // While the kernel copies: hashing is on our thread, in pieces that others do not notice.
    for (let at = 0; at < bytes.length; at += HASH_PIECE_BYTES) {
      this.#hash.update(bytes.subarray(at, at + HASH_PIECE_BYTES));
      await Promise.resolve();
    }
    this.#bytes += bytes.length;
    await writing;
  }

  async finish(): Promise<{ sha256: string; bytes: number }> {
    await this.#handle.datasync();
    return { sha256: this.#hash.digest("hex"), bytes: this.#bytes };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#handle.close();
  }
}

const HASH_PIECE_BYTES = 1 << 20;

/** The file in memory, once its hash was found right. For the small ones. */
export async function readVerified(
  dir: string,
  name: MemoryFile,
  expected: { sha256: string; bytes: number },
  maxBytes: number,
): Promise<Buffer> {
  if (expected.bytes > maxBytes) throw mismatch(name, `${expected.bytes} bytes are too many`);
  await using handle = await openSized(dir, name, expected);
  const content = Buffer.allocUnsafeSlow(expected.bytes);
  await readFully(handle, content, content.length, 0, name);
  const actual = createHash("sha256").update(content).digest("hex");
  if (actual !== expected.sha256) throw mismatch(name, "its hash is wrong");
  return content;
}

/** Opens the file and checks its hash piece by piece; the handle stays the caller's. */
export async function openVerified(
  dir: string,
  name: MemoryFile,
  expected: { sha256: string; bytes: number },
  signal: AbortSignal,
): Promise<FileHandle> {
  const handle = await openSized(dir, name, expected);
  try {
    const hash = createHash("sha256");
    const piece = Buffer.allocUnsafeSlow(Math.min(HASH_PIECE_BYTES, Math.max(expected.bytes, 1)));
    for (let at = 0; at < expected.bytes; at += piece.length) {
      signal.throwIfAborted();
      const bytes = Math.min(piece.length, expected.bytes - at);
      await readFully(handle, piece, bytes, at, name);
      hash.update(piece.subarray(0, bytes));
    }
    if (hash.digest("hex") !== expected.sha256) throw mismatch(name, "its hash is wrong");
    return handle;
  } catch (cause) {
    await handle.close();
    throw cause;
  }
}

/** The file, if it is one and has the size that the manifest says. */
export async function openSized(
  dir: string,
  name: MemoryFile,
  expected: { bytes: number },
): Promise<FileHandle> {
  let handle: FileHandle;
  try {
    handle = await open(memoryFilePath(dir, name), constants.O_RDONLY | constants.O_NOFOLLOW);
  } catch (cause) {
    if (isErrno(cause, "ENOENT")) throw mismatch(name, "it is missing");
    throw cause;
  }
  const found = await handle.stat();
  if (found.isFile() && found.size === expected.bytes) return handle;
  await handle.close();
  throw mismatch(name, `it has ${found.size} bytes, not ${expected.bytes}`);
}

export async function readFully(
  handle: FileHandle,
  into: Buffer,
  bytes: number,
  position: number,
  what: string,
): Promise<void> {
  let done = 0;
  while (done < bytes) {
    const { bytesRead } = await handle.read(into, done, bytes - done, position + done);
    if (bytesRead === 0) throw new Error(`${what} ended early`);
    done += bytesRead;
  }
}

/** What a caller sees of a manifest that does not fit: nothing of it was used. */
export function mismatch(what: string, why: string): RookeryError {
  return new RookeryError("host_error", `The memory image cannot be used: ${what}: ${why}.`);
}

/** Bytes really allocated for the files of a directory. */
export async function allocatedBytes(dir: string): Promise<number> {
  const paths = [...Object.values(MEMORY_FILES), MANIFEST].map((name) => join(dir, name));
  const stats = await Promise.all(paths.map((path) => stat(path)));
  return stats.reduce((sum, each) => sum + each.blocks * 512, 0);
}
