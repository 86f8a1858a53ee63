import { strict as assert } from "node:assert";
import { mkdir, mkdtemp, readdir, readFile, stat, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, test } from "vitest";
import { z } from "zod";
import { readJson, removeTree, temporaryPathOf, writeFileAtomic } from "./atomic-file.ts";

let dir: string;
beforeEach(async () => {
  dir = await mkdtemp(join(tmpdir(), "rookery-atomic-"));
});
afterEach(() => removeTree(dir));

test("a file written has the mode asked for, whatever the umask, and nothing beside it", async () => {
  const path = join(dir, "a.json");
  const umask = process.umask(0o077);
  try {
    await writeFileAtomic(path, "{}", { mode: 0o644 });
  } finally {
    process.umask(umask);
  }
  assert.equal((await stat(path)).mode & 0o777, 0o644);
  assert.deepEqual(await readdir(dir), ["a.json"]);
});

test("writes that race leave one of them, whole, the last begun winning", async () => {
  const path = join(dir, "a");
  await Promise.all(
    Array.from({ length: 20 }, (_, i) => writeFileAtomic(path, `${i}`.repeat(10_000), { sync: false })),
  );
  assert.equal(await readFile(path, "utf8"), "19".repeat(10_000));
  assert.deepEqual(await readdir(dir), ["a"]);
});

test("what a crash left of a write is taken away by the next, and a planted link is not followed", async () => {
  const path = join(dir, "a");
  await writeFile(join(dir, "victim"), "mine");
  await symlink(join(dir, "victim"), temporaryPathOf(path));
  await writeFileAtomic(path, "new");
  assert.equal(await readFile(join(dir, "victim"), "utf8"), "mine");
  assert.equal(await readFile(path, "utf8"), "new");
  assert.deepEqual((await readdir(dir)).sort(), ["a", "victim"]);
});

test("a write that fails leaves the old bytes and no temporary file, and does not spoil the next", async () => {
  const path = join(dir, "a");
  await writeFileAtomic(join(path, "x"), "1").then(
    () => assert.fail("wrote below a directory that is not there"),
    (error: NodeJS.ErrnoException) => assert.equal(error.code, "ENOENT"),
  );
  await writeFileAtomic(path, "2");
  assert.equal(await readFile(path, "utf8"), "2");
  assert.deepEqual(await readdir(dir), ["a"]);
});

test("reading JSON gives what the schema says, or an error that names the file", async () => {
  const path = join(dir, "a.json");
  const schema = z.strictObject({ n: z.int() });
  await assert.rejects(readJson(path, schema), { code: "ENOENT" });
  await writeFile(path, '{"n":1}');
  assert.deepEqual(await readJson(path, schema), { n: 1 });
  await writeFile(path, '{"n":"1"}');
  await assert.rejects(readJson(path, schema), /a\.json: is not what it should be/);
  await writeFile(path, '{"n":');
  await assert.rejects(readJson(path, schema), /a\.json: is not JSON/);
  await symlink(path, join(dir, "link"));
  await assert.rejects(readJson(join(dir, "link"), schema), { code: "ELOOP" });
});

test("removing a tree bears running twice and leaves what a link in it points to", async () => {
  const tree = join(dir, "tree");
  await writeFile(join(dir, "kept"), "kept");
  await writeFileAtomic(join(dir, "file"), "x");
  await removeTree(join(dir, "file"));
  await mkdir(join(tree, "deep"), { recursive: true });
  await symlink(join(dir, "kept"), join(tree, "deep", "link"));
  await removeTree(tree);
  await removeTree(tree);
  assert.deepEqual(await readdir(dir), ["kept"]);
});
