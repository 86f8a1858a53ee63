/**
 * The root disk: the Debian tree, Rookery's own files on top, written as an
 * ext4 file system into a sparse file. Nothing is mounted.
 */
import { chmod, chown, copyFile, lutimes, mkdir, open, readdir, symlink } from "node:fs/promises";
import { join } from "node:path";
import { removeTree } from "../host/atomic-file.ts";
import type { BuildContext } from "./build-context.ts";
import { SOURCE_DATE_EPOCH } from "./build-context.ts";
import { TREE_FILE } from "./debian-stage.ts";
import { ROOT_DISK_FILE } from "./guest-image.ts";

const TOOL_TIMEOUT_MS = 300_000;
/** Fixed, so that equal inputs give equal disks; a guest has one file system of ours only. */
const FILE_SYSTEM_UUID = "5b0d7a5e-3c51-4b6a-9e59-1a3c1b6f8e20";
const HASH_SEED = "5b0d7a5e-3c51-4b6a-9e59-1a3c1b6f8e21";
/** Where the guest looks for what is ours. */
const ROOKERY_DIR = "usr/lib/rookery";

export async function makeRootDisk(
  context: BuildContext,
  options: {
    debianDir: string;
    envdBundleDir: string;
    nodeBinary: string;
    sizeBytes: number;
    workDir: string;
    targetDir: string;
  },
): Promise<void> {
  const { debianDir, envdBundleDir, nodeBinary, sizeBytes, workDir, targetDir } = options;
  const { signal } = context;
  const tree = join(workDir, "tree");
  await mkdir(tree, { mode: 0o755 });

  context.report("root-disk", "Unpacking the Debian tree", 0);
  await context.run(
    [
      "tar",
      "--extract",
      "--zstd",
      `--file=${join(debianDir, TREE_FILE)}`,
      `--directory=${tree}`,
      "--same-permissions",
      "--same-owner",
      "--numeric-owner",
      "--xattrs",
      "--xattrs-include=*", // file capabilities are in security.*
      "--exclude=./dev/*", // the guest's kernel fills it
    ],
    { signal, timeoutMs: TOOL_TIMEOUT_MS },
  );

  context.report("root-disk", "Adding envd, Node and the guest's init", 0.4);
  await placeTree(join(context.guestFilesDir, "root"), tree);
  await placeTree(envdBundleDir, join(tree, ROOKERY_DIR));
  await placeFile(nodeBinary, join(tree, ROOKERY_DIR, "node"), 0o755);
  for (const link of ["usr/local/bin/node", "usr/local/bin/nodejs"]) {
    await symlink(`/${ROOKERY_DIR}/node`, join(tree, link));
    await lutimes(join(tree, link), SOURCE_DATE_EPOCH, SOURCE_DATE_EPOCH);
  }

  context.report("root-disk", "Writing the file system", 0.5);
  const disk = join(targetDir, ROOT_DISK_FILE);
  {
    await using file = await open(disk, "wx", 0o644);
    await file.truncate(sizeBytes);
  }
  await context.run(
    [
      "mkfs.ext4",
      "-q",
      "-F",
      "-m",
      "0", // root in a guest is no one special
      "-L",
      "rookery",
      "-U",
      FILE_SYSTEM_UUID,
      "-E",
      // Nothing is left for the guest's kernel to initialise in the background: that would
      // dirty every clone's disk. The journal needs no zeros written: the file is new, so it has none but zeros.
      `lazy_itable_init=0,lazy_journal_init=1,hash_seed=${HASH_SEED}`,
      "-d",
      tree,
      disk,
    ],
    { signal, timeoutMs: TOOL_TIMEOUT_MS, env: { E2FSPROGS_FAKE_TIME: String(SOURCE_DATE_EPOCH) } },
  );
  await removeTree(tree);
}

/**
 * Copies a tree of plain files over `to`. Of the permissions only "executable"
 * counts: it is all that a checkout keeps, whatever the umask was.
 */
async function placeTree(from: string, to: string): Promise<void> {
  for (const entry of await readdir(from, { withFileTypes: true })) {
    const source = join(from, entry.name);
    const target = join(to, entry.name);
    if (entry.isDirectory()) {
      const made = await mkdir(target, { recursive: true, mode: 0o755 });
      if (made !== undefined) {
        await chmod(target, 0o755);
        await chown(target, 0, 0);
      }
      await placeTree(source, target);
      await lutimes(target, SOURCE_DATE_EPOCH, SOURCE_DATE_EPOCH);
    } else if (entry.isFile()) {
      await placeFile(source, target, (await isExecutable(source)) ? 0o755 : 0o644);
    } else {
      throw new Error(`${source}: neither a file nor a directory`);
    }
  }
}

async function placeFile(from: string, to: string, mode: number): Promise<void> {
  await copyFile(from, to);
  await chown(to, 0, 0);
  await chmod(to, mode);
  await lutimes(to, SOURCE_DATE_EPOCH, SOURCE_DATE_EPOCH);
}

async function isExecutable(path: string): Promise<boolean> {
  await using file = await open(path, "r");
  return ((await file.stat()).mode & 0o100) !== 0;
}
