import { lstat, mkdir, mkdtemp, readFile, rm, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, expect, test } from "vitest";
import { linkInto, linkNameOf, removeLink } from "./run-dir-links.ts";

let root: string;
let runDir: string;
let disk: string;
beforeEach(async () => {
  root = await mkdtemp(join(tmpdir(), "rk-links-"));
  runDir = join(root, "run");
  disk = join(root, "disk.qcow2");
  await mkdir(runDir);
  await writeFile(disk, "disk");
});
afterEach(() => rm(root, { recursive: true, force: true }));

test("a link that the VMM put in a disk's place is replaced, and what it names stays", async () => {
  const other = join(root, "other");
  await writeFile(other, "other");
  const name = await linkNameOf(disk);
  await symlink(other, join(runDir, name));
  await linkInto(runDir, disk);
  expect((await lstat(join(runDir, name))).ino).toBe((await lstat(disk)).ino);
  expect(await readFile(other, "utf8")).toBe("other");
});

test("a directory in a disk's place is refused, and not walked into", async () => {
  const target = join(runDir, await linkNameOf(disk));
  await mkdir(target);
  await writeFile(join(target, "file"), "kept");
  await expect(linkInto(runDir, disk)).rejects.toMatchObject({ code: "host_error" });
  await expect(removeLink(target)).rejects.toMatchObject({ code: "host_error" });
  expect(await readFile(join(target, "file"), "utf8")).toBe("kept");
});
