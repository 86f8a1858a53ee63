/**
 * Snapshot: the present memory and disk of a sandbox, as a template. The
 * source keeps its state.
 *
 * Of a running sandbox it is a fork: a next disk top is made while the guest
 * runs; frozen, the guest's pages are copied and the VMM switches to the next
 * top; the guest goes on, and the rest is written beside it. Of a paused one
 * the disk gets a next top too, and the memory layer is linked.
 *
 * Once the VMM may have switched (`fork.switching`, in the record before it
 * does), the disk only goes forward: the old top is a layer whether a snapshot
 * comes of it or not. `snapshot.json` is the commit point.
 */
import { link, mkdir, readdir, stat } from "node:fs/promises";
import { join } from "node:path";
import { RookeryError } from "@rookery/protocol/errors";
import { removeTree, syncDirectory } from "../host/atomic-file.ts";
import type { LayerId, SnapshotId } from "../ids.ts";
import type { SnapshotRecord } from "../journal/records.ts";
import type { DiskAttachment } from "../root-disk/root-disk.ts";
import type { LayerCapture, MemoryLayer } from "../vmm/vmm.ts";
import { compatOf } from "./compat.ts";
import { persist, type Core, type SandboxEntry } from "./core.ts";
import { hasMark } from "./holding.ts";
import { layerIdsOf } from "./disk-layers.ts";
import type { Step } from "./steps.ts";

export interface SnapshotContext {
  core: Core;
  entry: SandboxEntry;
  snapshotId: SnapshotId;
  teamId: string;
  layerId: LayerId;
  next?: DiskAttachment;
  capture?: LayerCapture;
  layer?: MemoryLayer;
  record?: SnapshotRecord;
}

const MIB = 1 << 20;

const journalFork: Step<SnapshotContext> = {
  name: "journal-fork",
  async run({ core, entry, snapshotId, layerId }) {
    entry.set({ fork: { snapshotId, layerId, switching: false } });
    await persist(core, entry, { durable: false });
    await mkdir(core.journal.snapshotDir(snapshotId), { recursive: true, mode: 0o711 });
  },
  async undo({ core, entry, snapshotId }) {
    await core.journal.removeSnapshotDir(snapshotId);
    // A fork that did not get its layer yet is finished before anything else is done with the disk.
    if (entry.record.fork?.switching === true) return;
    entry.set({ fork: undefined });
    await persist(core, entry, { durable: false });
  },
};

const prepareTop: Step<SnapshotContext> = {
  name: "prepare-next-top",
  async run(ctx, signal) {
    const { core, entry } = ctx;
    const user = entry.phase === "running" ? entry.record.vm : undefined;
    ctx.next = (await core.deps.rootDisk.prepareNextTop(entry.disk!, user, signal)).next;
  },
  async undo({ core, entry }) {
    if (entry.record.fork?.switching === true) return;
    await core.deps.rootDisk.abortNextTop(
      entry.disk!,
      entry.phase === "running" ? entry.record.vm : undefined,
    );
  },
};

const commitTop: Step<SnapshotContext> = {
  name: "commit-next-top",
  async run(ctx, signal) {
    await commitFork(ctx.core, ctx.entry, signal);
  },
};

const writeRecord: Step<SnapshotContext> = {
  name: "write-record",
  async run(ctx, signal) {
    const { core, entry, snapshotId, teamId, layer, layerId } = ctx;
    const { chain } = entry.disk!;
    const top = chain.find((disk) => disk.kind === "layer" && disk.id === layerId);
    if (top === undefined) throw new Error(`layer ${layerId} is not in the chain of ${entry.id}`);
    const { spec, warmKey } = entry.record;
    const warm = await core.deps.warmImages.open(warmKey!, signal);
    ctx.record = {
      version: 1,
      id: snapshotId,
      teamId,
      sourceSandboxId: entry.id,
      machineId: entry.record.machineId,
      createdAtMs: core.deps.clock.nowMs(),
      warmKey: warmKey!,
      vcpus: spec.vcpus,
      memoryMb: spec.memoryMb,
      diskMb: Math.ceil(entry.disk!.sizeBytes / MIB),
      chain: [...chain],
      layer: { pageBytes: layer!.pageBytes, allocatedBytes: layer!.allocatedBytes },
      sizeBytes: layer!.allocatedBytes + (await stat(top.path)).blocks * 512,
      ...(warm !== undefined && { compat: compatOf(core.deps, warm.base.fingerprint) }),
    };
    core.snapshots.set(snapshotId, ctx.record);
    await core.journal.writeSnapshot(ctx.record);
  },
  async undo({ core, snapshotId }) {
    core.snapshots.delete(snapshotId);
  },
};

export const snapshotRunningSteps: readonly Step<SnapshotContext>[] = [
  journalFork,
  prepareTop,
  {
    name: "freeze",
    async run({ entry }, signal) {
      await entry.placed!.vm.freeze(signal);
    },
    async undo({ entry }, signal) {
      if (entry.placed!.vm.state === "frozen") await entry.placed!.vm.unfreeze(signal);
    },
  },
  {
    name: "capture",
    async run(ctx, signal) {
      ctx.capture = await ctx.entry.placed!.vm.captureLayer(signal);
    },
  },
  {
    name: "journal-switching",
    async run({ core, entry }) {
      entry.set({ fork: { ...entry.record.fork!, switching: true } });
      await persist(core, entry, { durable: false });
    },
    // Whether it switched or not, from here on it has: see `finishFork`.
    async undo({ core, entry }, signal) {
      await finishFork(core, entry, signal);
    },
  },
  {
    name: "switch-disk-top",
    async run({ entry, next }, signal) {
      await entry.placed!.vm.switchDiskTop(next!, signal);
    },
  },
  {
    name: "unfreeze",
    async run({ entry }, signal) {
      await entry.placed!.vm.unfreeze(signal);
    },
  },
  commitTop,
  {
    name: "write-layer",
    async run(ctx, signal) {
      ctx.layer = await ctx.capture!.writeTo(ctx.core.journal.snapshotLayerDir(ctx.snapshotId), signal);
      delete ctx.capture; // tens of megabytes
    },
  },
  writeRecord,
];

export const snapshotPausedSteps: readonly Step<SnapshotContext>[] = [
  journalFork,
  prepareTop,
  {
    name: "link-layer",
    async run(ctx) {
      const { core, entry, snapshotId } = ctx;
      const { name, ...facts } = entry.record.layer!;
      const dir = core.journal.snapshotLayerDir(snapshotId);
      await linkTree(core.journal.memoryLayerDir(entry.id, name), dir);
      ctx.layer = { dir, ...facts };
    },
  },
  {
    name: "journal-switching",
    async run({ core, entry }) {
      entry.set({ fork: { ...entry.record.fork!, switching: true } });
      await persist(core, entry, { durable: true });
    },
    async undo({ core, entry }, signal) {
      await finishFork(core, entry, signal);
    },
  },
  commitTop,
  writeRecord,
];

/** Once there is a snapshot; bears repetition. */
export const snapshotDoneSteps: readonly Step<SnapshotContext>[] = [
  {
    name: "journal-forked",
    async run({ core, entry }) {
      entry.set({ fork: undefined });
      await persist(core, entry, { durable: false });
    },
  },
];

/**
 * Carries a fork through whose VMM may have switched: by undo, by the janitor,
 * and after a crash of the agent. Leaves the guest running unless it is held.
 */
export async function finishFork(core: Core, entry: SandboxEntry, signal: AbortSignal): Promise<void> {
  const { fork } = entry.record;
  if (fork === undefined) return;
  const vm = entry.placed?.vm;
  if (fork.switching) {
    if (vm !== undefined && !isCommitted(entry, fork.layerId)) {
      const { next } = await core.deps.rootDisk.prepareNextTop(entry.disk!, entry.record.vm, signal);
      if (vm.state === "running") await vm.freeze(signal);
      await vm.switchDiskTop(next, signal);
    }
    if (vm?.state === "frozen" && !hasMark(entry.record)) await vm.unfreeze(signal);
    await commitFork(core, entry, signal);
  } else {
    await core.deps.rootDisk.abortNextTop(entry.disk!, vm === undefined ? undefined : entry.record.vm);
    if (vm?.state === "frozen" && !hasMark(entry.record)) await vm.unfreeze(signal);
  }
  entry.set({ fork: undefined });
  await persist(core, entry, { durable: false });
}

async function commitFork(core: Core, entry: SandboxEntry, signal: AbortSignal): Promise<void> {
  const { layerId } = entry.record.fork!;
  if (isCommitted(entry, layerId)) return;
  entry.disk = await core.deps.rootDisk.commitNextTop(
    entry.disk!,
    { layerId, layersDir: core.journal.layersDir },
    signal,
  );
}

function isCommitted(entry: SandboxEntry, layerId: LayerId): boolean {
  return layerIdsOf(entry.disk!.chain).includes(layerId);
}

/** The files of a layer are never written again, so another directory may have them too. */
async function linkTree(from: string, to: string): Promise<void> {
  await removeTree(to); // of an attempt that a crash cut off
  await mkdir(to, { recursive: true, mode: 0o711 });
  for (const file of await readdir(from, { withFileTypes: true })) {
    if (!file.isFile())
      throw new RookeryError("internal", "a memory layer holds something that is not a file");
    await link(join(from, file.name), join(to, file.name));
  }
  await syncDirectory(to);
}
