/**
 * Destroy: everything that a sandbox holds goes, its tombstone stays.
 *
 * Nothing here is undone: each step bears repetition, and what did not get
 * through is run again, by the next command, by the janitor, or by recovery.
 * `endSteps` do the same for a sandbox whose VM ended by itself, but keep its record.
 */
import { RookeryError } from "@rookery/protocol/errors";
import { guestAddressOf, persist, reportPendingEvent, type Core, type SandboxEntry } from "./core.ts";
import { layerIdsOf } from "./disk-layers.ts";
import { dropOtherLayers } from "./pause.ts";
import type { Step } from "./steps.ts";

export interface DestroyContext {
  core: Core;
  entry: SandboxEntry;
}

type EndStep = Step<DestroyContext>;

const killVm: EndStep = {
  name: "kill-vm",
  async run({ core, entry }) {
    entry.endUses(
      new RookeryError("wrong_state", "the sandbox has ended", { details: { status: entry.phase } }),
    );
    if (entry.placed === undefined) {
      if (entry.record.vm !== undefined) await core.pool.places.releaseLeft(entry.record.vm.vmId);
      return;
    }
    await entry.placed.vm.kill();
    await core.deps.guest.release(guestAddressOf(entry.placed));
  },
};

const detachDisk: EndStep = {
  name: "detach-disk",
  async run({ core, entry }, signal) {
    const { vm } = entry.record;
    if (vm !== undefined && entry.disk !== undefined) await core.deps.rootDisk.detach(entry.disk, vm, signal);
  },
};

const releasePlace: EndStep = {
  name: "release-place",
  async run({ core, entry }) {
    if (entry.placed !== undefined) await core.pool.discard(entry.placed);
    entry.placed = undefined;
  },
};

const removeDisk: EndStep = {
  name: "remove-disk",
  async run({ core, entry }) {
    if (entry.record.fork !== undefined) entry.orphans.add(entry.record.fork.layerId);
    for (const id of layerIdsOf(entry.disk?.chain ?? [])) entry.orphans.add(id);
    await core.deps.rootDisk.remove(core.journal.diskDir(entry.id));
    entry.disk = undefined;
  },
};

const sweepLayers: EndStep = {
  name: "sweep-layers",
  async run({ core, entry }) {
    await core.layers.sweep(entry.orphans);
  },
};

export const destroySteps: readonly EndStep[] = [
  {
    name: "journal-stopping",
    async run({ core, entry }) {
      await persist(core, entry, { durable: false });
    },
  },
  killVm,
  detachDisk,
  releasePlace,
  removeDisk,
  sweepLayers,
  {
    name: "report",
    async run({ core, entry }) {
      await reportPendingEvent(core, entry);
    },
  },
  {
    name: "write-tombstone",
    async run({ core, entry }) {
      const { generation, last } = entry.record;
      await core.tombstones.add({ id: entry.id, generation, last, destroyedAtMs: core.deps.clock.nowMs() });
    },
  },
  {
    name: "remove-record",
    async run({ core, entry }) {
      await core.journal.removeSandboxDir(entry.id);
      core.sandboxes.delete(entry.id);
    },
  },
];

/** `exit` and `pendingEvent` are in the record before these run. */
export const endSteps: readonly EndStep[] = [
  {
    name: "journal-failed",
    async run({ core, entry }) {
      entry.set({ phase: "failed", layer: undefined, thawing: undefined });
      await persist(core, entry, { durable: true });
    },
  },
  killVm,
  detachDisk,
  releasePlace,
  removeDisk,
  {
    name: "remove-layers",
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
  sweepLayers,
  {
    name: "journal-ended",
    async run({ core, entry }) {
      entry.set({ vm: undefined, fork: undefined });
      await persist(core, entry, { durable: true });
    },
  },
];
