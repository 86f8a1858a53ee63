/**
 * A directory as the object store: for the agents of one machine, or on a file
 * system that hosts share.
 *
 *   ROOT/store.id        the store's identity, made once
 *   ROOT/objects/KEY     an object
 *   ROOT/unfinished/     objects that are being written
 */
import { randomBytes } from "node:crypto";
import { constants } from "node:fs";
import { link, lstat, mkdir, open, readdir, readFile, rename, rm, stat } from "node:fs/promises";
import { dirname, join, relative } from "node:path";
import { syncDirectory } from "../host/atomic-file.ts";
import { ignoring } from "../host/errno.ts";
import {
  assertKey,
  storeAway,
  type ObjectFacts,
  type ObjectStore,
  type StoredObject,
} from "./object-store.ts";

const PIECE_BYTES = 1 << 20;
/** Nobody writes one object for so long: what is older was left by a crash. */
const ABANDONED_MS = 24 * 3_600_000;

export class DirectoryStore implements ObjectStore {
  readonly kind = "directory";
  readonly #root: string;
  readonly #objects: string;
  readonly #unfinished: string;
  readonly #nowMs: () => number;

  /** `root` is absolute; it is made when it is missing. */
  constructor(root: string, options: { nowMs?: () => number } = {}) {
    this.#root = root;
    this.#objects = join(root, "objects");
    this.#unfinished = join(root, "unfinished");
    this.#nowMs = options.nowMs ?? Date.now;
  }

  async identity(): Promise<string> {
    return await this.#guard("its directory", async () => {
      const path = join(this.#root, "store.id");
      await mkdir(this.#root, { recursive: true, mode: 0o700 });
      await this.#removeAbandoned();
      if (!(await exists(path))) {
        // Of several that make it at once, one wins, and all read the winner's.
        const mine = join(this.#root, `.store.id.${randomBytes(8).toString("hex")}`);
        try {
          await writeDurably(mine, [Buffer.from(randomBytes(32).toString("hex"))]);
          await link(mine, path).catch(ignoring("EEXIST"));
          await syncDirectory(this.#root);
        } finally {
          await rm(mine, { force: true });
        }
      }
      const id = (await readFile(path, "utf8")).trim();
      if (!/^[0-9a-f]{64}$/.test(id)) throw new Error(`${path} is damaged`);
      return id;
    });
  }

  async head(key: string): Promise<ObjectFacts | undefined> {
    const path = this.#pathOf(key);
    return await this.#guard(key, async () => {
      const found = await lstat(path, { bigint: true }).catch(ignoring("ENOENT", "ENOTDIR"));
      return found?.isFile() === true ? factsOf(found) : undefined;
    });
  }

  async put(key: string, content: AsyncIterable<Uint8Array>, signal: AbortSignal): Promise<void> {
    const path = this.#pathOf(key);
    const unfinished = join(this.#unfinished, randomBytes(16).toString("hex"));
    await this.#guard("making room", () => mkdir(this.#unfinished, { recursive: true, mode: 0o700 }));
    try {
      // The content's own failure is its maker's, not the store's.
      await writeDurably(unfinished, content, { signal, guard: (work) => this.#guard(key, work) });
      signal.throwIfAborted();
      await this.#guard(key, async () => {
        await mkdir(dirname(path), { recursive: true, mode: 0o700 });
        await rename(unfinished, path);
        for (let dir = dirname(path); dir.length >= this.#root.length; dir = dirname(dir)) {
          await syncDirectory(dir);
        }
      });
    } finally {
      await rm(unfinished, { force: true });
    }
  }

  async get(key: string, { from }: { from: number }, signal: AbortSignal): Promise<StoredObject | undefined> {
    const path = this.#pathOf(key);
    return await this.#guard(key, async () => {
      const file = await open(path, constants.O_RDONLY | constants.O_NOFOLLOW).catch(
        ignoring("ENOENT", "ENOTDIR"),
      );
      if (file === undefined) return undefined;
      const found = await file.stat({ bigint: true });
      if (!found.isFile()) {
        await file.close();
        return undefined;
      }
      const body = file.createReadStream({ start: from, highWaterMark: PIECE_BYTES, signal });
      body.on("error", () => undefined); // seen by who reads it; nobody may
      return { facts: factsOf(found), body };
    });
  }

  async *list(prefix: string): AsyncGenerator<{ key: string; bytes: number; modifiedMs: number }> {
    const entries = await this.#guard(prefix, async () => {
      const found = await readdir(this.#objects, { recursive: true, withFileTypes: true }).catch(
        ignoring("ENOENT"),
      );
      return found ?? [];
    });
    for (const entry of entries) {
      const path = join(entry.parentPath, entry.name);
      const key = relative(this.#objects, path);
      if (!entry.isFile() || !key.startsWith(prefix)) continue;
      const facts = await this.head(key);
      if (facts !== undefined) yield { key, bytes: facts.bytes, modifiedMs: facts.modifiedMs };
    }
  }

  async delete(key: string): Promise<void> {
    const path = this.#pathOf(key);
    await this.#guard(key, async () => {
      await rm(path, { force: true });
      await syncDirectory(dirname(path)).catch(ignoring("ENOENT"));
    });
  }

  close(): void {}

  async #removeAbandoned(): Promise<void> {
    for (const name of (await readdir(this.#unfinished).catch(ignoring("ENOENT"))) ?? []) {
      const path = join(this.#unfinished, name);
      const facts = await stat(path).catch(ignoring("ENOENT"));
      if (facts !== undefined && this.#nowMs() - facts.mtimeMs > ABANDONED_MS)
        await rm(path, { force: true });
    }
  }

  #pathOf(key: string): string {
    assertKey(key);
    return join(this.#objects, key);
  }

  async #guard<T>(what: string, work: () => Promise<T>): Promise<T> {
    try {
      return await work();
    } catch (cause) {
      throw storeAway(what, cause);
    }
  }
}

function factsOf(found: { size: bigint; ino: bigint; mtimeNs: bigint; mtimeMs: bigint }): ObjectFacts {
  return {
    bytes: Number(found.size),
    tag: `${found.ino}-${found.mtimeNs}-${found.size}`,
    modifiedMs: Number(found.mtimeMs),
  };
}

async function writeDurably(
  path: string,
  content: AsyncIterable<Uint8Array> | Iterable<Uint8Array>,
  options: { signal?: AbortSignal; guard?: (work: () => Promise<unknown>) => Promise<unknown> } = {},
): Promise<void> {
  const { signal, guard = (work) => work() } = options;
  await using file = await open(path, "wx", 0o600);
  for await (const piece of content) {
    signal?.throwIfAborted();
    await guard(() => file.writeFile(piece));
  }
  await guard(() => file.sync());
}

async function exists(path: string): Promise<boolean> {
  return (await lstat(path).catch(ignoring("ENOENT"))) !== undefined;
}
