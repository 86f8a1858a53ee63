/**
 * One uploaded file on its way to the disk.
 *
 * It is written beside its target and renamed over it, so that readers see the
 * old file or the new one and a full disk leaves the old one whole. What is no
 * regular file, or has several names, is written in place instead: a rename
 * would put another file there.
 */
import {
  close,
  constants,
  copyFile,
  fstatSync,
  open,
  renameSync,
  statSync,
  unlinkSync,
  writev,
} from "node:fs";
import { fchmodSync, fchownSync, realpathSync } from "node:fs";
import type { Stats } from "node:fs";
import { posix } from "node:path";
import { promisify } from "node:util";
import { HttpError, errnoOf, systemMessage } from "../errors.ts";
import { NotADirectoryError, ensureDirectory } from "../filesystem/directories.ts";
import { WRITE_BATCH_BYTES } from "../limits.ts";
import type { Native } from "../system/native.ts";
import { randomHex } from "../system/random.ts";
import type { User } from "../system/users.ts";
import { writeMetadata } from "./metadata.ts";
import type { Metadata } from "./metadata.ts";

const openAsync = promisify(open);
const closeAsync = promisify(close);
const writevAsync = promisify(writev);
const copyFileAsync = promisify(copyFile);

const NEW_FILE_MODE = 0o644;

export interface WriteOptions {
  owner: User;
  metadata: Metadata;
  native: Native;
  /** Of the whole request, when it said so; for the message about a full disk. */
  announcedBytes: number | undefined;
}

/** Writes `body` to `path` and resolves when the file is there under its name. */
export async function writeFile(
  path: string,
  body: AsyncIterable<Uint8Array>,
  options: WriteOptions,
): Promise<void> {
  try {
    prepareParents(path, options.owner);
    const existing = statTarget(path);
    if (existing !== undefined && (!existing.isFile() || existing.nlink > 1)) {
      await writeInPlace(path, body, options);
    } else {
      // The link stays; the file that it leads to is replaced.
      const target = existing === undefined ? path : realpathSync(path);
      await writeBeside(target, existing, body, options);
    }
  } catch (error) {
    throw httpErrorOf(error, options.announcedBytes);
  }
}

function prepareParents(path: string, owner: User): void {
  if (path.endsWith("/")) throw new HttpError(400, `path is a directory: ${path}`);
  try {
    ensureDirectory(posix.dirname(path), owner);
  } catch (error) {
    if (error instanceof NotADirectoryError) throw new HttpError(400, error.message, { cause: error });
    throw error;
  }
}

function statTarget(path: string): Stats | undefined {
  try {
    const stat = statSync(path);
    if (stat.isDirectory()) throw new HttpError(400, `path is a directory: ${path}`);
    return stat;
  } catch (error) {
    if (errnoOf(error) === "ENOENT") return undefined;
    throw error;
  }
}

async function writeBeside(
  target: string,
  existing: Stats | undefined,
  body: AsyncIterable<Uint8Array>,
  { owner, metadata, native }: WriteOptions,
): Promise<void> {
  const temporary = posix.join(posix.dirname(target), `.rookery-upload-${randomHex(8)}`);
  const fd = await openAsync(temporary, constants.O_WRONLY | constants.O_CREAT | constants.O_EXCL, 0o600);
  try {
    try {
      await writeAll(fd, body);
      writeMetadata(fd, metadata, native);
      fchownSync(fd, owner.uid, owner.gid);
      // After the change of owner, which clears what must not be inherited.
      fchmodSync(fd, existing === undefined ? NEW_FILE_MODE : existing.mode & 0o777);
    } finally {
      await closeAsync(fd);
    }
    await replace(target, temporary);
  } catch (error) {
    removeIfThere(temporary);
    throw error;
  }
}

async function replace(target: string, temporary: string): Promise<void> {
  try {
    renameSync(temporary, target);
  } catch (error) {
    // A file that something is mounted on keeps its place.
    if (errnoOf(error) !== "EBUSY") throw error;
    await copyFileAsync(temporary, target);
    unlinkSync(temporary);
  }
}

function removeIfThere(path: string): void {
  try {
    unlinkSync(path);
  } catch (error) {
    if (errnoOf(error) !== "ENOENT") throw error;
  }
}

async function writeInPlace(
  path: string,
  body: AsyncIterable<Uint8Array>,
  { owner, metadata, native }: WriteOptions,
): Promise<void> {
  // A FIFO without a reader fails at once (ENXIO) and does not block a thread.
  const fd = await openAsync(path, constants.O_WRONLY | constants.O_TRUNC | constants.O_NONBLOCK);
  try {
    if (fstatSync(fd).isFile()) {
      fchownSync(fd, owner.uid, owner.gid);
      writeMetadata(fd, metadata, native);
    }
    await writeAll(fd, body);
  } finally {
    await closeAsync(fd);
  }
}

/** Gathers the pieces of the network (64 KiB at most) into fewer, larger writes. */
async function writeAll(fd: number, body: AsyncIterable<Uint8Array>): Promise<void> {
  let batch: Uint8Array[] = [];
  let bytes = 0;
  const flush = async () => {
    const chunks = batch;
    batch = [];
    bytes = 0;
    await writeChunks(fd, chunks);
  };
  for await (const chunk of body) {
    batch.push(chunk);
    bytes += chunk.byteLength;
    if (bytes >= WRITE_BATCH_BYTES) await flush();
  }
  if (bytes > 0) await flush();
}

async function writeChunks(fd: number, chunks: Uint8Array[]): Promise<void> {
  let rest = chunks;
  while (rest.length > 0) {
    let { bytesWritten } = await writevAsync(fd, rest);
    // A disk that fills up takes a part first; the next write says ENOSPC.
    const left: Uint8Array[] = [];
    for (const chunk of rest) {
      const taken = Math.min(bytesWritten, chunk.byteLength);
      bytesWritten -= taken;
      if (taken < chunk.byteLength) left.push(chunk.subarray(taken));
    }
    rest = left;
  }
}

function httpErrorOf(error: unknown, announcedBytes: number | undefined): unknown {
  if (error instanceof HttpError) return error;
  const errno = errnoOf(error);
  const cause = { cause: error };
  if (errno === "ENOSPC" || errno === "EDQUOT") {
    const attempt = announcedBytes === undefined ? "" : `attempted to write ${announcedBytes} bytes: `;
    return new HttpError(507, `${attempt}not enough disk space available`, cause);
  }
  if (errno === "ENAMETOOLONG" || errno === "ELOOP" || errno === "ENOTDIR") {
    return new HttpError(400, `error opening file: ${systemMessage(error)}`, cause);
  }
  // Not the disk's: the body's, which its reader explains.
  if (errno === undefined || !/^E(?!RR_)[A-Z0-9]+$/.test(errno) || errno === "ECONNRESET") return error;
  return new HttpError(500, `error writing file: ${systemMessage(error)}`, cause);
}
