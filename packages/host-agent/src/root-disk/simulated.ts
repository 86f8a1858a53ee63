/**
 * Root disks of a simulated host: as in qcow2.ts, with a text instead of a disk
 * in each file, so that "the host is as it was" can be read off, and so that
 * disks outlive the agent's process.
 */
import { existsSync } from "node:fs";
import { link, lstat, mkdir, readdir, readFile, rename, rm, stat, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { removeTree } from "../host/atomic-file.ts";
import { isErrno } from "../host/errno.ts";
import { readDiskManifest, writeDiskManifest } from "./disk-manifest.ts";
import type { DiskAttachment, DiskLayer, RootDisk, RootDiskDriver } from "./root-disk.ts";

/** `trouble` fails what a test wants to fail: it throws from inside an effect, before or after it. */
export function openSimulatedDisks(trouble: (effect: string) => void): RootDiskDriver {
  const top = (dir: string, chain: readonly DiskLayer[]) => join(dir, `top-${chain.length}`);
  const nextTop = (disk: RootDisk) => join(disk.dir, `top-${disk.chain.length + 1}`);
  const save = (disk: RootDisk): Promise<void> => writeDiskManifest(disk, { sync: false });
  const open = (dir: string): Promise<RootDisk> => readDiskManifest(dir, "simulated");
  const linkInto = async (runDir: string, file: string): Promise<string> => {
    const name = `disk-${(await lstat(file)).ino}`;
    await link(file, join(runDir, name)).catch((cause: unknown) => {
      if (!isErrno(cause, "EEXIST")) throw cause;
    });
    return name;
  };
  const attachment = async (
    runDir: string,
    disk: RootDisk,
    tops: readonly string[],
  ): Promise<DiskAttachment> => {
    const files = [...tops, ...disk.chain.map(({ path }) => path).toReversed()];
    const names = await Promise.all(files.map((file) => linkInto(runDir, file)));
    const nodes = names.map((file, index) => ({ file, format: "qcow2" as const, readOnly: index > 0 }));
    return { kind: "file-chain", nodes, sizeBytes: disk.sizeBytes };
  };
  return {
    kind: "simulated",
    async probe() {
      return { ok: true, reason: "simulated: holds no data" };
    },
    async create({ dir, chain, sizeBytes }) {
      trouble("disk.create");
      await mkdir(dir, { recursive: true });
      const disk: RootDisk = { driver: "simulated", dir, chain, sizeBytes };
      await writeFile(top(dir, chain), "");
      await save(disk);
      trouble("disk.created");
      return disk;
    },
    open,
    async attach(disk, user) {
      trouble("disk.attach");
      return await attachment(user.runDir, disk, [top(disk.dir, disk.chain)]);
    },
    async detach(_disk, user) {
      trouble("disk.detach");
      const names = await readdir(user.runDir).catch((cause: unknown) => {
        if (isErrno(cause, "ENOENT")) return [];
        throw cause;
      });
      for (const name of names) await rm(join(user.runDir, name), { force: true });
    },
    async prepareNextTop(disk, user) {
      trouble("disk.prepare");
      if (!existsSync(nextTop(disk))) await writeFile(nextTop(disk), "");
      const tops = [nextTop(disk), top(disk.dir, disk.chain)];
      if (user === undefined) return { next: { kind: "file-chain", nodes: [], sizeBytes: disk.sizeBytes } };
      return { next: await attachment(user.runDir, disk, tops) };
    },
    async commitNextTop(disk, { layerId, layersDir }) {
      trouble("disk.commit");
      const path = join(layersDir, layerId, "disk.qcow2");
      await mkdir(join(layersDir, layerId), { recursive: true });
      await link(top(disk.dir, disk.chain), path).catch((cause: unknown) => {
        if (!isErrno(cause, "EEXIST")) throw cause;
      });
      if (!existsSync(nextTop(disk))) throw new Error("no next top was prepared");
      const chain: DiskLayer[] = [...disk.chain, { kind: "layer", id: layerId, path, format: "qcow2" }];
      const committed = { ...disk, chain };
      await save(committed);
      trouble("disk.committed");
      await rm(top(disk.dir, disk.chain), { force: true });
      return committed;
    },
    async adoptLayer({ file, layerId, layersDir }) {
      trouble("disk.adopt");
      const path = join(layersDir, layerId, "disk.qcow2");
      await mkdir(join(layersDir, layerId), { recursive: true });
      if (!existsSync(path)) await rename(file, path);
      return { kind: "layer", id: layerId, path, format: "qcow2" };
    },
    async abortNextTop(disk) {
      trouble("disk.abort");
      const present = await open(disk.dir);
      await rm(nextTop(present), { force: true });
    },
    async grow(disk, sizeBytes) {
      const grown = { ...disk, sizeBytes };
      await save(grown);
      return grown;
    },
    needsFlatten: (disk) => disk.chain.length > 6,
    async flatten(disk) {
      trouble("disk.flatten");
      let text = await readFile(top(disk.dir, disk.chain), "utf8");
      for (const layer of disk.chain.toReversed()) text ||= await readFile(layer.path, "utf8");
      const flat = { ...disk, chain: disk.chain.slice(0, 1) };
      const merged = `${top(disk.dir, flat.chain)}.new`;
      await writeFile(merged, text);
      await rename(merged, top(disk.dir, flat.chain));
      await save(flat);
      await rm(top(disk.dir, disk.chain), { force: true });
      return flat;
    },
    async allocatedBytes(disk) {
      return (await stat(top(disk.dir, disk.chain))).blocks * 512;
    },
    async sync() {
      trouble("disk.sync");
    },
    async remove(dir) {
      trouble("disk.remove");
      await removeTree(dir);
    },
  };
}
