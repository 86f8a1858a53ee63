/**
 * Create: a clone of a warm image, or of a snapshot's memory on its warm image,
 * becomes a sandbox.
 *
 * Everything before `journal-running` is undone on failure, and by recovery
 * after a crash: a sandbox whose record says "starting" never existed.
 */
import { rename } from "node:fs/promises";
import { RookeryError } from "@rookery/protocol/errors";
import type { SnapshotRecord } from "../journal/records.ts";
import type { DiskAttachment } from "../root-disk/root-disk.ts";
import type { PlacedVm } from "../vm-pool/vm-pool.ts";
import { guestAddressOf, persist, vmReferenceOf, type Core, type SandboxEntry } from "./core.ts";
import type { SandboxSpec } from "./sandbox.ts";
import { startGuest } from "./start-guest.ts";
import type { Step } from "./steps.ts";
import type { WarmImage } from "./warm-images.ts";

export interface CreateContext {
  core: Core;
  entry: SandboxEntry;
  warm: WarmImage;
  /** Its source, when that is a snapshot. */
  snapshot: SnapshotRecord | undefined;
  placed?: PlacedVm;
  /** The disk that the VM changes to, unless it was spawned with the right one. */
  attachment?: DiskAttachment;
}

const MIB = 1 << 20;

export const createSteps: readonly Step<CreateContext>[] = [
  {
    name: "take-vm",
    async run(ctx, signal) {
      ctx.placed = await ctx.core.pool.take(ctx.warm, signal);
    },
    async undo(ctx) {
      if (ctx.placed !== undefined) await ctx.core.pool.discard(ctx.placed);
    },
  },
  {
    name: "journal-intent",
    async run({ core, entry, warm, placed }) {
      entry.set({ warmKey: warm.key, vm: vmReferenceOf(placed!) });
      await persist(core, entry, { durable: false });
    },
    async undo({ core, entry }) {
      await core.journal.removeSandboxDir(entry.id);
    },
  },
  {
    name: "give-disk",
    async run(ctx, signal) {
      await giveDisk(ctx, signal);
    },
    async undo({ core, entry, placed }, signal) {
      await placed!.vm.kill();
      if (entry.disk !== undefined) {
        await core.deps.rootDisk.detach(entry.disk, placed!.place.record, signal);
        await core.deps.rootDisk.remove(entry.disk.dir);
      }
      entry.disk = undefined;
    },
  },
  {
    name: "thaw",
    async run({ core, entry, placed, attachment, snapshot, warm }, signal) {
      const grownBytes = growthOf(entry.record.spec, { snapshot, warm });
      await placed!.vm.thaw(
        {
          ...(attachment !== undefined && { disk: attachment }),
          ...(grownBytes !== undefined && { growDiskToBytes: grownBytes }),
          ...(snapshot !== undefined && {
            layer: { dir: core.journal.snapshotLayerDir(snapshot.id), ...snapshot.layer },
          }),
        },
        signal,
      );
    },
  },
  {
    // The VMM has enlarged the file and told its guest; what is left is the manifest.
    name: "record-growth",
    async run({ core, entry, snapshot, warm }, signal) {
      const grownBytes = growthOf(entry.record.spec, { snapshot, warm });
      if (grownBytes === undefined) return;
      entry.disk = await core.deps.rootDisk.grow(entry.disk!, grownBytes, signal);
    },
  },
  {
    name: "await-guest",
    async run({ core, entry, placed, snapshot, warm }, signal) {
      const growRootFs = growthOf(entry.record.spec, { snapshot, warm }) !== undefined;
      await startGuest(core, entry, placed!, { growRootFs }, signal);
    },
    async undo({ core, placed }) {
      await core.deps.guest.release(guestAddressOf(placed!));
    },
  },
  {
    name: "journal-running",
    async run({ core, entry }) {
      const nowMs = core.deps.clock.nowMs();
      entry.lastActivityMs = nowMs;
      entry.set({ phase: "running", startedAtMs: nowMs, lifetimeSinceMs: nowMs });
      await persist(core, entry, { durable: false });
    },
  },
];

/** After the sandbox runs: what a failure here leaves goes with the VM's place. */
export const createdSteps: readonly Step<CreateContext>[] = [
  {
    name: "drop-spare-disk",
    async run({ core, placed }) {
      await core.pool.dropOwnDisk(placed!);
    },
  },
];

/** Of the size that the frozen guest knows. The clone's own disk serves, by a rename, when there is nothing on it yet. */
async function giveDisk(ctx: CreateContext, signal: AbortSignal): Promise<void> {
  const { core, entry, warm, snapshot } = ctx;
  const placed = ctx.placed!;
  const { rootDisk } = core.deps;
  const dir = core.journal.diskDir(entry.id);
  if (snapshot === undefined && placed.ownDisk !== undefined) {
    await rename(placed.ownDisk.dir, dir);
    placed.ownDisk = undefined;
    entry.disk = await rootDisk.open(dir);
    return;
  }
  const chain = snapshot?.chain ?? warm.diskChain;
  const sizeBytes = knownSizeOf({ snapshot, warm });
  entry.disk = await rootDisk.create({ dir, chain, sizeBytes }, signal);
  ctx.attachment = await rootDisk.attach(entry.disk, placed.place.record, signal);
}

interface Source {
  snapshot: SnapshotRecord | undefined;
  warm: WarmImage;
}

function knownSizeOf({ snapshot, warm }: Source): number {
  return snapshot === undefined ? warm.diskSizeBytes : snapshot.diskMb * MIB;
}

/** The new size of the block device, when it is not the one that the frozen guest knows. */
function growthOf(spec: SandboxSpec, source: Source): number | undefined {
  const wantedBytes = spec.diskMb * MIB;
  return wantedBytes > knownSizeOf(source) ? wantedBytes : undefined;
}

/** What a request may ask of its source, decided before anything is made. */
export function checkSpecAgainstSource(spec: SandboxSpec, source: Source): void {
  const { snapshot, warm } = source;
  if (snapshot !== undefined && (spec.vcpus !== snapshot.vcpus || spec.memoryMb !== snapshot.memoryMb)) {
    throw new RookeryError(
      "unsupported_shape",
      `a sandbox of this snapshot has ${snapshot.vcpus} vCPUs and ${snapshot.memoryMb} MB, as it had`,
    );
  }
  const leastMb = Math.ceil(knownSizeOf({ snapshot, warm }) / MIB);
  if (spec.diskMb < leastMb) {
    throw new RookeryError("unsupported_shape", `its disk has at least ${leastMb} MB`, {
      details: { field: "disk_mb", reason: `must be at least ${leastMb}` },
    });
  }
}
