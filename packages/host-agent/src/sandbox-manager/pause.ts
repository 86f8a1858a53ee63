/**
 * Pause: the guest's memory becomes a layer on disk, and its VM ends.
 *
 * The commit point is `journal-paused`. Any failure before it, and the guest
 * goes on as if nothing had happened; after it the sandbox is paused whatever
 * happens, and `retireSteps` are run until they get through.
 *
 * Invariant: while a record says "pausing", a layer may exist only if the guest
 * has been frozen since it was taken. So undo takes the layer away first.
 */
import { readdir } from "node:fs/promises";
import { removeTree } from "../host/atomic-file.ts";
import type { LayerCapture, MemoryLayer } from "../vmm/vmm.ts";
import { RookeryError } from "@rookery/protocol/errors";
import { guestAddressOf, persist, reportPendingEvent, type Core, type SandboxEntry } from "./core.ts";
import type { SandboxRecord } from "../journal/records.ts";
import { hasMark, type HoldMark } from "./holding.ts";
import type { Step } from "./steps.ts";

export interface PauseContext {
  core: Core;
  entry: SandboxEntry;
  /** When the agent does it by itself. */
  event: SandboxRecord["pendingEvent"];
  /** Of a guest that is held already: its marks, and what is still to be reported. */
  before?: HoldMark & Pick<SandboxRecord, "pendingEvent">;
  capture?: LayerCapture;
  layer?: MemoryLayer;
}

export const pauseSteps: readonly Step<PauseContext>[] = [
  {
    name: "journal-pausing",
    async run({ core, entry }) {
      entry.set({ phase: "pausing" });
      await persist(core, entry, { durable: false });
    },
    async undo({ core, entry }) {
      entry.set({ phase: "running" });
      await persist(core, entry, { durable: false });
    },
  },
  {
    name: "freeze",
    async run({ entry }, signal) {
      if (entry.placed!.vm.state === "running") await entry.placed!.vm.freeze(signal);
    },
    async undo({ entry }, signal) {
      if (hasMark(entry.record)) return;
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
    // Before the layer's manifest: a complete layer implies a disk that it fits.
    name: "sync-disk",
    async run({ core, entry }) {
      await core.deps.rootDisk.sync(entry.disk!);
    },
  },
  {
    name: "write-layer",
    async run(ctx, signal) {
      ctx.layer = await ctx.capture!.writeTo(
        ctx.core.journal.memoryLayerDir(ctx.entry.id, layerNameOf(ctx.entry)),
        signal,
      );
      delete ctx.capture; // tens of megabytes
    },
    async undo({ core, entry }) {
      await removeTree(core.journal.memoryLayerDir(entry.id, layerNameOf(entry)));
    },
  },
  {
    name: "journal-paused",
    async run(ctx) {
      const { core, entry, layer, event } = ctx;
      const { pageBytes, allocatedBytes } = layer!;
      const { frozen, stranger, pendingEvent } = entry.record;
      ctx.before = { frozen, stranger, pendingEvent };
      entry.set({
        phase: "paused",
        layer: { name: layerNameOf(entry), pageBytes, allocatedBytes },
        pendingEvent: event ?? pendingEvent,
        frozen: undefined,
        stranger: undefined,
      });
      await persist(core, entry, { durable: true });
    },
    async undo({ core, entry, before }) {
      // Before the layer goes: a record on disk must not promise it.
      entry.set({ phase: "pausing", layer: undefined, ...before });
      await persist(core, entry, { durable: true });
    },
  },
];

/** What a paused sandbox has no more need of. Each step bears repetition. */
export const retireSteps: readonly Step<{ core: Core; entry: SandboxEntry }>[] = [
  {
    name: "kill-vm",
    async run({ core, entry }) {
      const { placed, record } = entry;
      if (placed === undefined) {
        // What a former agent left, or an undo: dead before the disk is touched.
        if (record.vm !== undefined) await core.pool.places.releaseLeft(record.vm.vmId);
        return;
      }
      entry.endUses(
        new RookeryError("wrong_state", "the sandbox was paused", { details: { status: "paused" } }),
      );
      await placed.vm.kill();
      await core.deps.guest.release(guestAddressOf(placed));
    },
  },
  {
    name: "detach-disk",
    async run({ core, entry }, signal) {
      const { vm } = entry.record;
      if (vm !== undefined && entry.disk !== undefined)
        await core.deps.rootDisk.detach(entry.disk, vm, signal);
    },
  },
  {
    name: "release-place",
    async run({ core, entry }) {
      if (entry.placed !== undefined) await core.pool.discard(entry.placed);
      entry.placed = undefined;
    },
  },
  {
    // Of a resume that went back, or of a crash between two records.
    name: "drop-other-layers",
    async run({ core, entry }) {
      await dropOtherLayers(core, entry);
    },
  },
  {
    name: "report",
    async run({ core, entry }) {
      await reportPendingEvent(core, entry);
    },
  },
  {
    name: "journal-retired",
    async run({ core, entry }) {
      entry.set({ vm: undefined });
      await persist(core, entry, { durable: false });
    },
  },
];

/** Named by the VM that it is taken from: a VM is frozen for good at most once. */
export function layerNameOf(entry: SandboxEntry): string {
  return `layer-${entry.record.vm!.vmId}`;
}

/** Removes what looks like a layer and is not the one that the record names. */
export async function dropOtherLayers(core: Core, entry: SandboxEntry): Promise<void> {
  for (const name of await readdir(core.journal.sandboxDir(entry.id))) {
    if (!name.startsWith("layer-") || name === entry.record.layer?.name) continue;
    await removeTree(core.journal.memoryLayerDir(entry.id, name));
  }
}
