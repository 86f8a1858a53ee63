/**
 * Root disks, networks, cgroups and envd of a simulated host: files in a
 * directory, so that "the host is as it was" can be read off, and so that they
 * outlive the agent's process.
 */
import { existsSync, mkdirSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { link, lstat, mkdir, readdir, readFile, rename, rm, stat, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { RookeryError } from "@rookery/protocol/errors";
import type { GuestNetworkDriver, NetworkLease } from "../../guest-network/guest-network.ts";
import { removeTree, writeFileAtomic } from "../../host/atomic-file.ts";
import { isErrno } from "../../host/errno.ts";
import type { Slot } from "../../ids.ts";
import type { DiskAttachment, DiskLayer, RootDisk, RootDiskDriver } from "../../root-disk/root-disk.ts";
import type { VmCgroups } from "../../vm-pool/vm-cgroups.ts";
import type { ProcessTable, SimulatedProcess } from "../../vmm/simulated.ts";
import type { GuestAgent } from "../guest.ts";

/** Fails what the test wants to fail: thrown from inside an effect, before or after it. */
export type Trouble = (effect: string) => void;

/** As in root-disk/qcow2.ts, with a text instead of a disk in each file. */
export function openSimulatedDisks(trouble: Trouble): RootDiskDriver {
  const top = (dir: string, chain: readonly DiskLayer[]) => join(dir, `top-${chain.length}`);
  const nextTop = (disk: RootDisk) => join(disk.dir, `top-${disk.chain.length + 1}`);
  const manifest = (dir: string) => join(dir, "disk.json");
  const save = async (disk: RootDisk): Promise<void> => {
    const { chain, sizeBytes } = disk;
    await writeFileAtomic(manifest(disk.dir), JSON.stringify({ chain, sizeBytes }), { sync: false });
  };
  const open = async (dir: string): Promise<RootDisk> => {
    const { chain, sizeBytes } = JSON.parse(await readFile(manifest(dir), "utf8")) as RootDisk;
    return { driver: "qcow2", dir, chain, sizeBytes };
  };
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
    kind: "qcow2",
    async probe() {
      return { ok: true };
    },
    async create({ dir, chain, sizeBytes }) {
      trouble("disk.create");
      await mkdir(dir, { recursive: true });
      const disk: RootDisk = { driver: "qcow2", dir, chain, sizeBytes };
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

const FIRST_PORT = 20_000;

export function openSimulatedNetwork(dir: string, trouble: Trouble): GuestNetworkDriver {
  mkdirSync(dir, { recursive: true });
  return {
    kind: "user",
    addressing: { addressCidr: "10.0.2.15/24", gateway: "10.0.2.2", nameservers: [] },
    async probe() {
      return { ok: true };
    },
    plan(slot, uid): NetworkLease {
      const port = FIRST_PORT + slot;
      const forwards = [{ hostPort: port, guestPort: 49_983 }];
      const nic = { kind: "user" as const, mac: "02:00:00:00:00:01", forwards };
      return { driver: "user", slot, uid, nic, envdHost: "127.0.0.1", envdPort: port };
    },
    async up({ slot }) {
      trouble("network.up");
      await writeFile(join(dir, String(slot)), "");
      trouble("network.upped");
    },
    async down({ slot }) {
      trouble("network.down");
      await rm(join(dir, String(slot)), { force: true });
    },
    async listOwnedSlots() {
      return (await readdir(dir)).map((name) => Number(name) as Slot);
    },
  };
}

/** Killing what is in a group is killing the processes whose place is the group's. */
export function openSimulatedCgroups(dir: string, processes: ProcessTable, trouble: Trouble): VmCgroups {
  mkdirSync(dir, { recursive: true });
  const path = (name: string) => join(dir, name.replace("/", "_"));
  return {
    async make(name) {
      trouble("cgroup.make");
      await writeFile(path(name), "");
      return [];
    },
    async remove(name) {
      trouble("cgroup.remove");
      for (const process of processes.all()) {
        if (name.endsWith(process.place.vmId)) processes.delete(process.pid);
      }
      await rm(path(name), { force: true });
    },
    async listOwned() {
      return (await readdir(dir)).map((name) => name.replace("_", "/"));
    },
  };
}

/** Processes as files: they outlive the process that simulates them. */
export function directoryProcessTable(dir: string): ProcessTable {
  mkdirSync(dir, { recursive: true });
  const path = (pid: number) => join(dir, `${pid}.json`);
  const read = (file: string): SimulatedProcess | undefined => {
    try {
      return JSON.parse(readFileSync(file, "utf8")) as SimulatedProcess;
    } catch (cause) {
      if (isErrno(cause, "ENOENT")) return undefined;
      throw cause;
    }
  };
  return {
    get: (pid) => read(path(pid)),
    set(process) {
      writeFileSync(`${path(process.pid)}.tmp`, JSON.stringify(process));
      renameSync(`${path(process.pid)}.tmp`, path(process.pid));
    },
    delete: (pid) => rmSync(path(pid), { force: true }),
    all: () =>
      readdirSync(dir)
        .filter((name) => name.endsWith(".json"))
        .flatMap((name) => read(join(dir, name)) ?? []),
  };
}

/** envd as a part of the simulated guest: it remembers its identity in the guest's memory. */
export function openSimulatedGuests(processes: ProcessTable, trouble: Trouble): GuestAgent {
  const find = (port: number): SimulatedProcess => {
    const found = processes.all().find(({ place, state }) => {
      const { nic } = place;
      return state === "running" && nic.kind === "user" && nic.forwards[0]?.hostPort === port;
    });
    if (found === undefined) throw new RookeryError("guest_error", "nobody answers");
    return found;
  };
  return {
    async init({ port }, init) {
      trouble("guest.init");
      const process = find(port);
      const { sandboxId, machineId, restoreId, accessToken } = init;
      const memory = { ...process.guest.memory, sandboxId, machineId, restoreId, accessToken };
      processes.set({ ...process, guest: { ...process.guest, memory } });
      trouble("guest.inited");
    },
    async release() {},
  };
}
