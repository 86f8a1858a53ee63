/**
 * Commands in any order, side by side, repeated and late, on a host that fails
 * now and then, with guests that die and agents that are started anew: nothing
 * without an owner, no illegal phase, no generation that goes back, and no
 * guest on a disk that does not fit its memory.
 */
import { rmSync } from "node:fs";
import { RookeryError } from "@rookery/protocol/errors";
import * as fc from "fast-check";
import { expect, test } from "vitest";
import type { SandboxId, SnapshotId } from "../ids.ts";
import { isHeld } from "./holding.ts";
import { openCore } from "./index.ts";
import { destroyEverything, expectNothingLeaked } from "./testing/expectations.ts";
import type { Stage } from "./testing/scenarios.ts";
import {
  newRoot,
  openSimulatedMachine,
  operationOf,
  sandboxId,
  snapshotId,
  specOf,
} from "./testing/simulated-machine.ts";
import { seededRandom } from "../simulated/seeded-random.ts";
import { tidy } from "./watches.ts";

const SANDBOXES = ["a", "b", "c"].map(sandboxId);
const SNAPSHOTS = ["x", "y"].map(snapshotId);

const sandbox = fc.constantFrom(...SANDBOXES);
const snapshot = fc.constantFrom(...SNAPSHOTS);
/** How far the command's generation is from the newest one given out: late ones are behind. */
const step = fc.constantFrom(1, 1, 1, 1, 0, -1);
const command = fc.oneof(
  { weight: 4, arbitrary: fc.record({ kind: fc.constant("create"), id: sandbox, step }) },
  { weight: 3, arbitrary: fc.record({ kind: fc.constant("pause"), id: sandbox, step }) },
  { weight: 3, arbitrary: fc.record({ kind: fc.constant("resume"), id: sandbox, step }) },
  { weight: 2, arbitrary: fc.record({ kind: fc.constant("snapshot"), id: sandbox, step, snapshot }) },
  { weight: 2, arbitrary: fc.record({ kind: fc.constant("createFrom"), id: sandbox, step, snapshot }) },
  { weight: 1, arbitrary: fc.record({ kind: fc.constant("freeze"), id: sandbox, step }) },
  { weight: 1, arbitrary: fc.record({ kind: fc.constant("thaw"), id: sandbox, step }) },
  { weight: 1, arbitrary: fc.record({ kind: fc.constant("destroy"), id: sandbox, step }) },
  { weight: 1, arbitrary: fc.record({ kind: fc.constant("deleteSnapshot"), id: sandbox, step, snapshot }) },
  { weight: 1, arbitrary: fc.record({ kind: fc.constant("crashGuest"), id: sandbox, step }) },
);
type Command = { kind: string; id: SandboxId; step: number; snapshot?: SnapshotId };
const batch = fc.record({
  commands: fc.array(command, { minLength: 1, maxLength: 4 }),
  after: fc.constantFrom("nothing", "nothing", "tidy", "restart", "reboot"),
});

async function play(stage: Stage, { kind, id, snapshot: snap }: Command, generation: number): Promise<void> {
  const { manager, machine, core } = stage;
  const operation = operationOf(id, generation);
  switch (kind) {
    case "create":
      return void (await manager.create(specOf(id), operation));
    case "createFrom": {
      const source = { kind: "snapshot" as const, snapshotId: snap! };
      return void (await manager.create(specOf(id, { source }), operation));
    }
    case "pause":
      return void (await manager.pause(operation));
    case "resume":
      return void (await manager.resume(operation));
    case "snapshot":
      return void (await manager.createSnapshot(operation, snap!, "team-1"));
    case "freeze":
      return void (await manager.freeze(id));
    case "thaw":
      return void (await manager.thaw(id));
    case "destroy":
      return await manager.destroy(operation);
    case "deleteSnapshot":
      return await manager.deleteSnapshot(snap!);
    case "crashGuest": {
      const pid = core.sandboxes.get(id)?.placed?.vm.record.pid;
      if (pid !== undefined) machine.vmm.crash(pid, { reason: "guest_crashed", message: "panic" });
    }
  }
}

/** All that the agent does by itself meanwhile is done when the queues are empty. */
async function whenQuiet({ core }: Stage): Promise<void> {
  while ([...core.sandboxes.values()].some(({ queue }) => queue.length > 0)) {
    await Promise.all([...core.sandboxes.values()].map(({ queue }) => queue.idle()));
  }
}

test(
  "whatever is commanded and whatever fails, nothing leaks and nothing is mixed up",
  { timeout: 180_000 },
  async () => {
    const property = fc.asyncProperty(
      fc.array(batch, { minLength: 1, maxLength: 10 }),
      fc.integer({ min: 1, max: 1_000_000 }),
      async (batches, seed) => {
        const root = newRoot();
        const random = seededRandom(seed);
        let failing = true;
        const trouble = (effect: string) => {
          if (failing && random() < 0.04) throw new Error(`trouble in ${effect}`);
        };
        let boot = 1;
        const open = async (): Promise<Stage> => {
          const config = { retryIntervalMs: 3_600_000, reaperIntervalMs: 3_600_000 };
          const machine = openSimulatedMachine(root, {
            trouble,
            config,
            seed: Math.floor(random() * 2 ** 31),
            bootId: `boot-${boot}`,
          });
          return { machine, ...(await openCore(machine.deps)) };
        };
        let stage = await open();
        const newest = new Map<SandboxId, number>();
        const seen = new Map<SandboxId, bigint>();
        try {
          for (const { commands, after } of batches) {
            await Promise.all(
              commands.map(async (one) => {
                const generation = Math.max(1, (newest.get(one.id) ?? 0) + one.step);
                newest.set(one.id, Math.max(newest.get(one.id) ?? 0, generation));
                try {
                  await play(stage, one, generation);
                } catch (cause) {
                  // Any refusal or failure is right, as long as it is one of our table.
                  if (!(cause instanceof RookeryError) && !String(cause).includes("trouble in")) throw cause;
                }
              }),
            );
            await whenQuiet(stage);
            for (const [id, { record, phase }] of stage.core.sandboxes) {
              expect(["running", "paused", "failed", "stopping"]).toContain(phase);
              expect(record.generation).toBeGreaterThanOrEqual(seen.get(id) ?? 0n);
              seen.set(id, record.generation);
            }
            if (after === "tidy") await tidy(stage.core);
            if (after === "restart" || after === "reboot") {
              // The former agent is gone: nobody tells it of its VMs any more.
              await stage.machine.vmm.close();
              await stage.core.events.close();
              await stage.core.tombstones.close();
              if (after === "reboot") {
                boot += 1;
                for (const { pid } of stage.machine.processes.all()) stage.machine.processes.delete(pid);
              }
              failing = false; // an agent whose start fails is started again by whoever runs it
              stage = await open();
              failing = true;
              await whenQuiet(stage);
            }
          }
          failing = false;
          await tidy(stage.core);
          await whenQuiet(stage);
          await tidy(stage.core);
          expectNothingLeaked(stage);
          for (const [id, entry] of stage.core.sandboxes) {
            if (entry.phase === "paused" || isHeld(entry.record)) {
              await stage.manager.resume(operationOf(id, Number(entry.record.generation) + 1));
            }
          }
          expectNothingLeaked(stage);
          await destroyEverything(stage);
        } finally {
          failing = false;
          await stage.manager.close();
          rmSync(root, { recursive: true, force: true });
        }
      },
    );
    await fc.assert(property, { numRuns: Number(process.env["ROOKERY_TEST_RUNS"] ?? 25) });
  },
);
