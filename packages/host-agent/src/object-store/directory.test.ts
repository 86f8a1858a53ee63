import assert from "node:assert/strict";
import { mkdir, mkdtemp, readdir, rm, utimes, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, test } from "vitest";
import { DirectoryStore } from "./directory.ts";
import { objectStoreContract, pieces } from "./object-store.contract.ts";

let root: string;
beforeAll(async () => {
  root = await mkdtemp(join(tmpdir(), "rk-store-"));
});
afterAll(() => rm(root, { recursive: true, force: true }));
const { signal } = new AbortController();

objectStoreContract("a directory", (name) => new DirectoryStore(join(root, name)));

test("what a crash left half-written goes after a day, and not before", async () => {
  const dir = join(root, "abandoned");
  await mkdir(join(dir, "unfinished"), { recursive: true });
  const [old, fresh] = [join(dir, "unfinished", "old"), join(dir, "unfinished", "fresh")];
  for (const path of [old, fresh]) await writeFile(path, "half");
  const now = Date.now();
  await utimes(old, now / 1000, now / 1000 - 25 * 3600);
  await new DirectoryStore(dir).identity();
  assert.deepEqual(await readdir(join(dir, "unfinished")), ["fresh"]);
});

test("a directory that cannot be written is unavailable", async () => {
  await writeFile(join(root, "file"), "no directory");
  const store = new DirectoryStore(join(root, "file"));
  await assert.rejects(store.put("key", pieces(Buffer.from("x"), 1), signal), { code: "unavailable" });
  await assert.rejects(store.identity(), { code: "unavailable" });
});
