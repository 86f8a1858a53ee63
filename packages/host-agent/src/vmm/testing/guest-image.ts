/**
 * The guest image that tests on real guests use: the newest complete one of the
 * product's own data directory, or of the directory that ROOKERY_TEST_IMAGES names.
 */
import { readdir, stat } from "node:fs/promises";
import { join } from "node:path";
import { z } from "zod";
import { readJson } from "../../host/atomic-file.ts";
import { isErrno } from "../../host/errno.ts";
import type { BootFiles } from "../vmm.ts";

const DEFAULT_DIR = join(import.meta.dirname, "../../../../../.rookery/agent/images");

export interface TestImage {
  hash: string;
  boot: BootFiles;
  rootDisk: { path: string; sizeBytes: number };
}

const manifestSchema = z.object({ hash: z.string(), cmdline: z.string(), createdAt: z.iso.datetime() });

/** Undefined: there is none on this machine, and a test that needs one is skipped. */
export async function findTestImage(): Promise<TestImage | undefined> {
  const root = process.env["ROOKERY_TEST_IMAGES"] ?? DEFAULT_DIR;
  const names = await readdir(root).catch((cause: unknown) => {
    if (isErrno(cause, "ENOENT")) return [];
    throw cause;
  });
  const found: { createdAt: string; image: TestImage }[] = [];
  for (const name of names.filter((each) => /^[0-9a-f]{64}$/.test(each))) {
    const dir = join(root, name);
    const { hash, cmdline, createdAt } = await readJson(join(dir, "manifest.json"), manifestSchema);
    const path = join(dir, "root.raw");
    const boot = { kernel: join(dir, "vmlinuz"), initrd: join(dir, "initrd.img"), cmdline };
    found.push({ createdAt, image: { hash, boot, rootDisk: { path, sizeBytes: (await stat(path)).size } } });
  }
  return found.toSorted((a, b) => b.createdAt.localeCompare(a.createdAt))[0]?.image;
}
