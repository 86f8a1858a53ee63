/**
 * Contents in the object store: each once, under the hash of its stream,
 * compressed (a guest image to a third, a warm image's memory too).
 *
 *   blobs/SHA256.zst
 *
 * Invariants: a file that `fetch` made has the content that was asked for; a
 * download that was cut off goes on where it ended, also after a restart of
 * the agent, as long as the object is the same.
 */
import { createHash } from "node:crypto";
import { mkdir, open, readdir, rename, rm, stat } from "node:fs/promises";
import { join } from "node:path";
import { pipeline, Readable } from "node:stream";
import { constants, createZstdCompress, createZstdDecompress } from "node:zlib";
import { RookeryError } from "@rookery/protocol/errors";
import { comesFromFullDisk, ignoring, isErrno } from "../host/errno.ts";
import type { ObjectStore } from "../object-store/object-store.ts";
import { OneAtATime } from "./one-at-a-time.ts";
import { Damaged, readSparse, writeSparse, type ContentRef } from "./sparse-stream.ts";

export interface BlobsOptions {
  store: ObjectStore;
  /** For what has come of downloads; the file system of the data. */
  partsDir: string;
  nowMs: () => number;
  sleep: (ms: number, signal: AbortSignal) => Promise<void>;
  /** A body that brings nothing for so long is given up, and asked for again. */
  idleMs?: number;
}

const LEVEL = 1;
const IDLE_MS = 30_000;
/** Tries in a row that brought nothing. */
const ATTEMPTS = 5;
const FIRST_PAUSE_MS = 250;
/**
 * The sweep removes what nobody refers to and what is older than this; an
 * uploader relies on nothing older than half of it, but sends it again. So
 * the two meet only if one of them stands still for half a day.
 */
export const SWEEP_AFTER_MS = 24 * 3_600_000;
const RENEW_AFTER_MS = SWEEP_AFTER_MS / 2;
/** Parts of downloads that nobody went on with. */
const PARTS_KEPT_MS = 24 * 3_600_000;

export const blobKey = (sha256: string): string => `blobs/${sha256}.zst`;
export const BLOB_KEY = /^blobs\/([0-9a-f]{64})\.zst$/;

export class Blobs {
  readonly #options: Required<BlobsOptions>;
  /** Per content: two would write one part. */
  readonly #fetches = new OneAtATime();

  constructor(options: BlobsOptions) {
    this.#options = { idleMs: IDLE_MS, ...options };
  }

  /** Once, before anything is fetched. */
  async open(): Promise<void> {
    const { partsDir, nowMs } = this.#options;
    await mkdir(partsDir, { recursive: true, mode: 0o700 });
    for (const name of await readdir(partsDir)) {
      const path = join(partsDir, name);
      const part = await stat(path).catch(ignoring("ENOENT"));
      if (part !== undefined && nowMs() - part.mtimeMs > PARTS_KEPT_MS) await rm(path, { force: true });
    }
  }

  /** Sees to it that the store has the content of a file that does not change. */
  async send(path: string, ref: ContentRef, signal: AbortSignal): Promise<"sent" | "there"> {
    const { store, nowMs } = this.#options;
    const present = await store.head(blobKey(ref.sha256), signal);
    if (present !== undefined && nowMs() - present.modifiedMs < RENEW_AFTER_MS) return "there";
    const level = { params: { [constants.ZSTD_c_compressionLevel]: LEVEL } };
    const compressed = createZstdCompress(level);
    pipeline(Readable.from(onlyIf(ref, readSparse(path, signal))), compressed, () => undefined); // who reads it is told
    await store.put(blobKey(ref.sha256), compressed, signal);
    return "sent";
  }

  async has(ref: ContentRef, signal: AbortSignal): Promise<boolean> {
    return (await this.#options.store.head(blobKey(ref.sha256), signal)) !== undefined;
  }

  /** Makes the file `path` (new, 0600, durable) with this content. `onBytes` hears how much came. */
  async fetch(
    ref: ContentRef,
    path: string,
    signal: AbortSignal,
    onBytes: (bytes: number) => void = () => undefined,
  ): Promise<void> {
    await this.#fetches.run(ref.sha256, async () => {
      signal.throwIfAborted();
      await this.#fetch(ref, path, signal, onBytes);
    });
  }

  async #fetch(
    ref: ContentRef,
    path: string,
    signal: AbortSignal,
    onBytes: (bytes: number) => void,
  ): Promise<void> {
    for (let secondTime = false; ; secondTime = true) {
      const part = await this.#download(ref, signal, onBytes);
      const unfinished = `${path}.unfinished`;
      await rm(unfinished, { force: true });
      try {
        await unpack(part, unfinished, ref, signal);
        await rename(unfinished, path);
        await rm(part, { force: true });
        return;
      } catch (cause) {
        await rm(unfinished, { force: true });
        if (comesFromFullDisk(cause)) await rm(part, { force: true });
        if (!(cause instanceof Damaged)) throw cause;
        // The part may have suffered on this host; what comes anew may be whole.
        await rm(part, { force: true });
        if (secondTime) {
          throw damaged({ cause });
        }
      }
    }
  }

  /** The path of the whole object, on this host. */
  async #download(ref: ContentRef, signal: AbortSignal, onBytes: (bytes: number) => void): Promise<string> {
    const { store, partsDir, sleep } = this.#options;
    for (let failures = 0; ; failures += 1) {
      let came = 0;
      try {
        const facts = await store.head(blobKey(ref.sha256), signal);
        if (facts === undefined) {
          throw new RookeryError("host_error", "The object store lacks a part of this snapshot.");
        }
        if (facts.bytes === 0) throw damaged();
        const mark = createHash("sha256").update(facts.tag).digest("hex").slice(0, 16);
        const part = join(partsDir, `${ref.sha256}.${mark}`);
        const have = await sizeOf(part);
        if (have > facts.bytes) await rm(part);
        if (have === facts.bytes) return part;
        await this.#append(
          ref,
          part,
          { from: have > facts.bytes ? 0 : have, tag: facts.tag },
          signal,
          (bytes) => {
            came += bytes;
            onBytes(bytes);
          },
        );
        failures = -1;
      } catch (cause) {
        signal.throwIfAborted();
        const mayPass = !(cause instanceof RookeryError) || cause.code === "unavailable";
        if (comesFromFullDisk(cause) || !mayPass) throw cause;
        if (came > 0) failures = 0;
        if (failures + 1 >= ATTEMPTS) {
          throw new RookeryError("unavailable", "The object store cannot be used now.", { cause });
        }
        await sleep(FIRST_PAUSE_MS * 2 ** failures, signal);
      }
    }
  }

  async #append(
    ref: ContentRef,
    part: string,
    begin: { from: number; tag: string },
    signal: AbortSignal,
    onBytes: (bytes: number) => void,
  ): Promise<void> {
    const { store, idleMs } = this.#options;
    const idle = new AbortController();
    const giveUp = (): void => idle.abort(new RookeryError("unavailable", "The object store sends nothing."));
    let timer = setTimeout(giveUp, idleMs);
    try {
      const either = AbortSignal.any([signal, idle.signal]);
      const object = await store.get(blobKey(ref.sha256), { from: begin.from }, either);
      // Deleted or replaced since: what is here is of another object.
      if (object?.facts.tag !== begin.tag) {
        idle.abort(new RookeryError("unavailable", "The object was replaced meanwhile."));
        return;
      }
      await using file = await open(part, "a", 0o600);
      for await (const piece of object.body) {
        clearTimeout(timer);
        timer = setTimeout(giveUp, idleMs);
        await file.writeFile(piece);
        onBytes(piece.length);
      }
    } finally {
      clearTimeout(timer);
    }
  }
}

/** Fails at the end if the file was not what it was taken for: nothing wrong is stored under a right name. */
async function* onlyIf(ref: ContentRef, stream: AsyncIterable<Buffer>): AsyncGenerator<Buffer> {
  const hash = createHash("sha256");
  for await (const piece of stream) {
    hash.update(piece);
    yield piece;
  }
  if (hash.digest("hex") !== ref.sha256) throw new Error("a file changed while it was sent to the store");
}

async function unpack(part: string, path: string, ref: ContentRef, signal: AbortSignal): Promise<void> {
  await using file = await open(part, "r");
  const plain = createZstdDecompress();
  pipeline(file.createReadStream({ autoClose: false }), plain, () => undefined); // who reads it is told
  await writeSparse(path, asDamage(plain), ref, signal);
}

/** What is no Zstandard stream, or ends early, was not stored by us like that. */
async function* asDamage(plain: AsyncIterable<Uint8Array>): AsyncGenerator<Uint8Array> {
  try {
    yield* plain;
  } catch (cause) {
    if (cause instanceof Error && /^(ZSTD_|Z_)/.test(String((cause as NodeJS.ErrnoException).code))) {
      throw new Damaged("it is not compressed as it should be", { cause });
    }
    throw cause;
  }
}

function damaged(options?: ErrorOptions): RookeryError {
  return new RookeryError("host_error", "What the object store has of this snapshot is damaged.", options);
}

async function sizeOf(path: string): Promise<number> {
  try {
    return (await stat(path)).size;
  } catch (cause) {
    if (isErrno(cause, "ENOENT")) return 0;
    throw cause;
  }
}
