/** Where a qcow2 disk's files lie in its directory (the picture is in qcow2.ts), and how they are changed as a whole. */
import { lstat, open, rename, rm, stat, symlink } from "node:fs/promises";
import { join } from "node:path";
import { isErrno } from "../host/errno.ts";
import type { LayerId } from "../ids.ts";
import { readQcow2Header } from "./qcow2-header.ts";
import { belowName } from "./qcow2-tool.ts";
import type { DiskAttachment, DiskLayer, RootDisk } from "./root-disk.ts";

const SECTOR_BYTES = 512;
export const FILE = "disk.qcow2";

export const topDir = (disk: RootDisk): string => join(disk.dir, `top-${disk.chain.length}`);
export const nextDir = (disk: RootDisk): string => join(disk.dir, `top-${disk.chain.length + 1}`);
export const topFile = (disk: RootDisk): string => join(topDir(disk), FILE);
export const nextFile = (disk: RootDisk): string => join(nextDir(disk), FILE);
export const presentTopFromNext = (disk: RootDisk): string => join("..", `top-${disk.chain.length}`, FILE);

/** Top first, as attachments are. */
export const layerFiles = (disk: RootDisk): string[] => disk.chain.map((layer) => layer.path).toReversed();

export function lastLayerId(disk: RootDisk): LayerId | undefined {
  const last = disk.chain.at(-1);
  return last?.kind === "layer" ? last.id : undefined;
}

/** The image is the last and raw; all above it are qcow2. */
export function attachment(names: readonly string[], disk: RootDisk): DiskAttachment {
  const nodes = names.map((file, index) => ({
    file,
    format: index === names.length - 1 ? ("raw" as const) : ("qcow2" as const),
    readOnly: index > 0,
  }));
  return { kind: "file-chain", nodes, sizeBytes: disk.sizeBytes };
}

/** Is there a next top that stands on the present one (by its own name, or by that of the layer it became)? */
export async function isNextTop(disk: RootDisk): Promise<boolean> {
  return isSameFile(join(nextDir(disk), belowName(disk.chain.length)), topFile(disk));
}

/** The image first, then layers, and a size that guests can be given. */
export async function checkGeometry(disk: RootDisk): Promise<void> {
  const { chain, sizeBytes } = disk;
  if (chain[0]?.kind !== "image" || chain.slice(1).some((layer) => layer.kind !== "layer")) {
    throw new Error(`${disk.dir}: a chain is one image below any number of layers`);
  }
  if (sizeBytes % SECTOR_BYTES !== 0) {
    throw new Error(`${disk.dir}: ${sizeBytes} bytes are not a whole number of sectors`);
  }
  const sizes = await Promise.all([chain[0], ...chain.slice(-1)].map(virtualSize));
  const least = Math.max(...sizes);
  if (sizeBytes < least) {
    throw new Error(`${disk.dir}: ${sizeBytes} bytes are less than the ${least} of what the disk stands on`);
  }
}

async function virtualSize(layer: DiskLayer): Promise<number> {
  return layer.format === "raw"
    ? (await lstat(layer.path)).size
    : (await readQcow2Header(layer.path)).sizeBytes;
}

/** `below` are the targets of `below-0` and up. */
export async function linkBelow(directory: string, below: readonly string[]): Promise<void> {
  for (const [index, target] of below.entries()) await symlink(target, join(directory, belowName(index)));
}

export async function replaceLink(path: string, target: string): Promise<void> {
  const unfinished = `${path}.tmp`;
  await rm(unfinished, { force: true });
  await symlink(target, unfinished);
  await rename(unfinished, path);
}

export async function syncFile(path: string): Promise<void> {
  await using file = await open(path, "r");
  await file.sync();
}

export async function exists(path: string): Promise<boolean> {
  return (await factsOf(path)) !== undefined;
}

export async function isSameFile(one: string, other: string): Promise<boolean> {
  const [a, b] = await Promise.all([factsOf(one), factsOf(other)]);
  return a !== undefined && b !== undefined && a.ino === b.ino && a.dev === b.dev;
}

async function factsOf(path: string): Promise<{ ino: number; dev: number } | undefined> {
  try {
    return await stat(path);
  } catch (cause) {
    if (isErrno(cause, "ENOENT", "ENOTDIR")) return undefined;
    throw cause;
  }
}
