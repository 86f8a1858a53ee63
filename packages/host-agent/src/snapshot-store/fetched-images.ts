/**
 * Image disks that came from the object store: DATA/store/images/SHA256/root.raw
 *
 * An image is named by what it was built from, and two hosts that build one
 * alike need not get the same bytes; chains need the same. Where this host has
 * them already, its own image serves.
 */
import { chmod, mkdir, readdir, rename } from "node:fs/promises";
import { join } from "node:path";
import { removeTree, syncDirectory } from "../host/atomic-file.ts";
import { isErrno } from "../host/errno.ts";
import { ROOT_DISK_FILE } from "../image/guest-image.ts";
import type { Blobs } from "./blobs.ts";
import type { ContentRefs } from "./content-refs.ts";
import { OneAtATime } from "./one-at-a-time.ts";
import type { Content } from "./stored-snapshot.ts";

export interface FetchedImagesOptions {
  dir: string;
  imagesDir: string;
  blobs: Blobs;
  refs: ContentRefs;
  nowMs: () => number;
}

/** Who was given one has this long until a chain of this host names it. */
const GRACE_MS = 24 * 3_600_000;

export class FetchedImages {
  readonly #options: FetchedImagesOptions;
  readonly #lastUsedMs = new Map<string, number>();
  /** By content, one thing at a time: a fetch, or a removal. */
  readonly #atWork = new OneAtATime();

  private constructor(options: FetchedImagesOptions) {
    this.#options = options;
  }

  static async open(options: FetchedImagesOptions): Promise<FetchedImages> {
    const { dir } = options;
    await mkdir(dir, { recursive: true, mode: 0o700 });
    for (const name of await readdir(dir)) if (name.startsWith(".")) await removeTree(join(dir, name));
    return new FetchedImages(options);
  }

  /** The path of this host's own image of `hash`, if it has just this content. */
  async ownPath(hash: string, disk: Content, signal: AbortSignal): Promise<string | undefined> {
    const path = join(this.#options.imagesDir, hash, ROOT_DISK_FILE);
    try {
      const { sha256 } = await this.#options.refs.of(path, signal);
      return sha256 === disk.sha256 ? path : undefined;
    } catch (cause) {
      if (isErrno(cause, "ENOENT")) return undefined;
      throw cause;
    }
  }

  has(disk: Content): Promise<boolean> {
    return this.#exists(disk.sha256);
  }

  async fetch(disk: Content, signal: AbortSignal, onBytes: (bytes: number) => void): Promise<string> {
    const { dir, blobs, nowMs } = this.#options;
    const { sha256 } = disk;
    return await this.#atWork.run(sha256, async () => {
      this.#lastUsedMs.set(sha256, nowMs());
      const path = join(dir, sha256, ROOT_DISK_FILE);
      if (await this.#exists(sha256)) return path;
      const unfinished = join(dir, `.${sha256}`);
      await removeTree(unfinished);
      await mkdir(unfinished, { mode: 0o700 });
      try {
        await blobs.fetch(disk, join(unfinished, ROOT_DISK_FILE), signal, onBytes);
        await chmod(join(unfinished, ROOT_DISK_FILE), 0o444);
        await syncDirectory(unfinished);
        await rename(unfinished, join(dir, sha256));
        await syncDirectory(dir);
      } finally {
        await removeTree(unfinished);
      }
      this.#lastUsedMs.set(sha256, nowMs());
      return path;
    });
  }

  /** `inUse`: paths that chains of this host name. */
  async sweep(inUse: ReadonlySet<string>): Promise<void> {
    const { dir, nowMs } = this.#options;
    for (const sha256 of await readdir(dir)) {
      if (!/^[0-9a-f]{64}$/.test(sha256) || inUse.has(join(dir, sha256, ROOT_DISK_FILE))) continue;
      await this.#atWork.run(sha256, async () => {
        if (nowMs() - (this.#lastUsedMs.get(sha256) ?? 0) <= GRACE_MS) return;
        await removeTree(join(dir, sha256));
      });
    }
  }

  async #exists(sha256: string): Promise<boolean> {
    return (await readdir(this.#options.dir)).includes(sha256);
  }
}
