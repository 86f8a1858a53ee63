/**
 * Resume: a clone of the warm image, plus the sandbox's layer, on its own disk.
 *
 * The danger is a disk that moves on while its layer stays: memory and disk
 * would no longer fit, so a layer is used once. Before the guest may run, the
 * record says so durably (`thawing`, with a mark of the disk). From there on:
 *
 *   guest runs          → it is never thawed again from that layer: it goes on, or
 *                         is frozen into a new layer ("paused" again)
 *   guest never ran, or → the disk still bears the mark: the old layer fits, and
 *   is dead               the sandbox is paused as before
 *   dead, mark differs  → the sandbox has failed; nothing can bring it back
 *
 * Recovery decides by the same three lines.
 */
import { RookeryError } from "@rookery/protocol/errors";
import { removeTree } from "../host/atomic-file.ts";
import type { SandboxRecord } from "../journal/records.ts";
import type { DiskAttachment } from "../root-disk/root-disk.ts";
import type { PlacedVm } from "../vm-pool/vm-pool.ts";
import { guestAddressOf, persist, vmReferenceOf, type Core, type SandboxEntry } from "./core.ts";
import { markDisk } from "./disk-mark.ts";
import type { Lifetime } from "./sandbox.ts";
import { startGuest } from "./start-guest.ts";
import type { Step } from "./steps.ts";
import type { WarmImage } from "./warm-images.ts";

export interface ResumeContext {
  core: Core;
  entry: SandboxEntry;
  /** Undefined only for recovery, which has its VM already. */
  warm: WarmImage | undefined;
  lifetime: Lifetime | undefined;
  placed?: PlacedVm;
  attachment?: DiskAttachment;
  /** What the sandbox goes back to: the old layer, or a new one of a guest that ran. */
  goBackTo: "paused" | "failed";
  usedLayer: NonNullable<SandboxRecord["layer"]>;
  beforeCommit?: SandboxRecord;
}

/** The commit point: from here on it runs, and its former layer means nothing. */
export async function journalRunning(
  core: Core,
  entry: SandboxEntry,
  lifetime: Lifetime | undefined,
): Promise<void> {
  const nowMs = core.deps.clock.nowMs();
  entry.lastActivityMs = nowMs;
  entry.set({
    phase: "running",
    thawing: undefined,
    layer: undefined,
    stranger: undefined,
    startedAtMs: nowMs,
    lifetimeSinceMs: nowMs,
  });
  if (lifetime !== undefined) entry.set({ spec: { ...entry.record.spec, lifetime } });
  await persist(core, entry, { durable: false });
}

export const resumeSteps: readonly Step<ResumeContext>[] = [
  {
    name: "take-vm",
    async run(ctx, signal) {
      ctx.placed = await ctx.core.pool.take(ctx.warm!, signal);
    },
    async undo({ core, placed }) {
      if (placed !== undefined) await core.pool.discard(placed);
    },
  },
  {
    name: "journal-resuming",
    async run({ core, entry, placed }) {
      entry.set({ phase: "resuming", vm: vmReferenceOf(placed!), thawing: undefined });
      await persist(core, entry, { durable: false });
    },
    async undo({ core, entry, goBackTo }) {
      if (goBackTo === "failed") return; // whoever called makes it so, with the VM's own reason
      // `vm` stays until its place is released: a crash meanwhile must still find the disk's user.
      entry.set({ phase: "paused", thawing: undefined });
      await persist(core, entry, { durable: true });
    },
  },
  {
    name: "attach-disk",
    async run(ctx, signal) {
      const { core, entry, placed } = ctx;
      ctx.attachment = await core.deps.rootDisk.attach(entry.disk!, placed!.place.record, signal);
    },
    async undo({ core, entry, placed }, signal) {
      await placed!.vm.kill();
      await core.deps.guest.release(guestAddressOf(placed!));
      await core.deps.rootDisk.detach(entry.disk!, placed!.place.record, signal);
    },
  },
  {
    name: "journal-thawing",
    async run({ core, entry }) {
      entry.set({ thawing: { diskMark: await markDisk(entry.disk!.dir) } });
      await persist(core, entry, { durable: true });
    },
  },
  {
    name: "thaw",
    async run({ core, entry, placed, attachment, usedLayer }, signal) {
      const { name, ...facts } = usedLayer;
      const layer = { dir: core.journal.memoryLayerDir(entry.id, name), ...facts };
      await placed!.vm.thaw({ disk: attachment!, layer }, signal);
    },
    undo: undoThaw,
  },
  {
    name: "await-guest",
    async run({ core, entry, placed }, signal) {
      await startGuest(core, entry, placed!, { growRootFs: false }, signal);
    },
  },
  {
    name: "journal-running",
    async run(ctx) {
      ctx.beforeCommit = ctx.entry.record;
      await journalRunning(ctx.core, ctx.entry, ctx.lifetime);
    },
    async undo({ core, entry, beforeCommit }) {
      if (beforeCommit === undefined || entry.phase !== "running") return;
      const { phase, thawing, layer } = beforeCommit;
      entry.set({ phase, thawing, layer });
      await persist(core, entry, { durable: false });
    },
  },
];

/** After the sandbox runs; each bears repetition, and recovery removes what is left. */
export const resumedSteps: readonly Step<ResumeContext>[] = [
  {
    name: "drop-layer",
    async run({ core, entry, usedLayer }) {
      await removeTree(core.journal.memoryLayerDir(entry.id, usedLayer.name));
    },
  },
  {
    name: "drop-spare-disk",
    async run({ core, placed }) {
      await core.pool.dropOwnDisk(placed!);
    },
  },
];

/** See the head of this file. Sets what the sandbox goes back to. */
async function undoThaw(ctx: ResumeContext, signal: AbortSignal): Promise<void> {
  const { core, entry, placed, usedLayer } = ctx;
  if (entry.record.layer !== undefined && entry.record.layer.name !== usedLayer.name) return; // done before
  const { vm } = placed!;
  if (vm.state === "running" || vm.state === "frozen") {
    try {
      await pauseAgain(ctx, signal);
      return;
    } catch (cause) {
      core.deps.logger.warn(
        { sandboxId: entry.id, err: cause },
        "a guest that ran could not be paused again",
      );
    }
  }
  await vm.kill();
  if (await isLayerStillGood(entry)) return;
  ctx.goBackTo = "failed";
  throw new RookeryError("guest_error", "the guest ended after it had begun to run, and its disk moved on");
}

/** The disk is as it was before the thaw began. Only when no VM writes to it any more, and within one boot. */
export async function isLayerStillGood(entry: SandboxEntry): Promise<boolean> {
  const { thawing, layer } = entry.record;
  if (layer === undefined || entry.disk === undefined) return false;
  return thawing === undefined || thawing.diskMark === (await markDisk(entry.disk.dir));
}

/** The guest ran, so its disk moved on: a new layer takes the old one's place. */
async function pauseAgain({ core, entry, placed }: ResumeContext, signal: AbortSignal): Promise<void> {
  const { vm } = placed!;
  if (vm.state === "running") await vm.freeze(signal);
  const capture = await vm.captureLayer(signal);
  await core.deps.rootDisk.sync(entry.disk!);
  const name = `layer-${placed!.place.record.vmId}`;
  const { pageBytes, allocatedBytes } = await capture.writeTo(
    core.journal.memoryLayerDir(entry.id, name),
    signal,
  );
  // Before the VM ends: from here on the new layer is the sandbox.
  entry.set({ phase: "paused", thawing: undefined, layer: { name, pageBytes, allocatedBytes } });
  await persist(core, entry, { durable: true });
}
