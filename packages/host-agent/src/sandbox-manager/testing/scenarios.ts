/**
 * One short story per operation, for tests that let it fail or die at each of
 * its steps: what was there before, the command, and how far a guest's memory
 * and disk can be trusted afterwards.
 */
import type { Core } from "../core.ts";
import type { OPERATIONS } from "../operations.ts";
import type { SandboxManager } from "../sandbox-manager.ts";
import { operationOf, sandboxId, snapshotId, specOf, type SimulatedMachine } from "./simulated-machine.ts";

export interface Stage {
  machine: SimulatedMachine;
  core: Core;
  manager: SandboxManager;
}

export interface Scenario {
  name: string;
  /** The lists of steps that `act` goes through. */
  operations: readonly (keyof typeof OPERATIONS)[];
  prepare(stage: Stage): Promise<void>;
  act(stage: Stage): Promise<void>;
}

/** There before and after, whatever happens to the other. */
export const OLD = sandboxId("old");
export const NEW = sandboxId("new");
export const SNAP = snapshotId("snap");
const GIVEN_SNAP = snapshotId("given");

async function createOld({ manager, machine, core }: Stage): Promise<void> {
  await manager.create(specOf(OLD), operationOf(OLD, 1));
  const process = machine.processes.get(core.sandboxes.get(OLD)!.placed!.vm.record.pid)!;
  const memory = { ...process.guest.memory, counter: "7" };
  machine.processes.set({ ...process, guest: { ...process.guest, memory } });
}

async function createOldPaused(stage: Stage): Promise<void> {
  await createOld(stage);
  await stage.manager.pause(operationOf(OLD, 2));
}

export const SCENARIOS: readonly Scenario[] = [
  {
    name: "create",
    operations: ["create", "created"],
    prepare: createOld,
    async act({ manager }) {
      await manager.create(specOf(NEW), operationOf(NEW, 1));
    },
  },
  {
    name: "create from a snapshot",
    operations: ["create", "created"],
    async prepare(stage) {
      await createOld(stage);
      await stage.manager.createSnapshot(operationOf(OLD, 2), GIVEN_SNAP, "team-1");
    },
    async act({ manager }) {
      const source = { kind: "snapshot" as const, snapshotId: GIVEN_SNAP };
      await manager.create(specOf(NEW, { source, diskMb: 8192 }), operationOf(NEW, 1));
    },
  },
  {
    name: "pause",
    operations: ["pause", "retire"],
    prepare: createOld,
    async act({ manager }) {
      await manager.pause(operationOf(OLD, 2));
    },
  },
  {
    name: "resume",
    operations: ["resume", "resumed"],
    prepare: createOldPaused,
    async act({ manager }) {
      await manager.resume(operationOf(OLD, 3));
    },
  },
  {
    name: "snapshot of a running sandbox",
    operations: ["snapshot-running", "snapshot-done"],
    prepare: createOld,
    async act({ manager }) {
      await manager.createSnapshot(operationOf(OLD, 2), SNAP, "team-1");
    },
  },
  {
    name: "snapshot of a paused sandbox",
    operations: ["snapshot-paused", "snapshot-done"],
    prepare: createOldPaused,
    async act({ manager }) {
      await manager.createSnapshot(operationOf(OLD, 3), SNAP, "team-1");
    },
  },
  {
    name: "freeze",
    operations: ["hold"],
    prepare: createOld,
    async act({ manager }) {
      await manager.freeze(OLD);
    },
  },
  {
    name: "thaw",
    operations: ["go-on"],
    async prepare(stage) {
      await createOld(stage);
      await stage.manager.freeze(OLD);
    },
    async act({ manager }) {
      await manager.thaw(OLD);
    },
  },
  {
    name: "pause of a frozen sandbox",
    operations: ["pause", "retire"],
    async prepare(stage) {
      await createOld(stage);
      await stage.manager.freeze(OLD);
    },
    async act({ manager }) {
      await manager.pause(operationOf(OLD, 2));
    },
  },
  {
    name: "destroy of a running sandbox",
    operations: ["destroy"],
    async prepare(stage) {
      await createOld(stage);
      await stage.manager.create(specOf(NEW), operationOf(NEW, 1));
    },
    async act({ manager }) {
      await manager.destroy(operationOf(NEW, 2));
    },
  },
  {
    name: "destroy of a paused sandbox",
    operations: ["destroy"],
    async prepare(stage) {
      await createOld(stage);
      await stage.manager.create(specOf(NEW), operationOf(NEW, 1));
      await stage.manager.pause(operationOf(NEW, 2));
    },
    async act({ manager }) {
      await manager.destroy(operationOf(NEW, 3));
    },
  },
];
