import { rmSync } from "node:fs";
import { afterEach, beforeEach, expect, test } from "vitest";
import { openCore } from "../sandbox-manager/index.ts";
import { newRoot, openSimulatedMachine } from "../sandbox-manager/testing/simulated-machine.ts";

const SHAPE = { vcpus: 1, memoryMb: 512 };
const never = new AbortController().signal;

let root: string;
beforeEach(() => {
  root = newRoot();
});
afterEach(() => rmSync(root, { recursive: true, force: true }));

test("a place that went in a second try is not taken away again from who has its slot now", async () => {
  const effects = new Set<string>();
  let failing: string | undefined;
  const machine = openSimulatedMachine(root, {
    trouble: (effect) => {
      effects.add(effect);
      if (effect === failing) throw new Error(`trouble in ${effect}`);
    },
  });
  const { core, manager } = await openCore(machine.deps);
  const { places } = core.pool;
  const first = await places.make(SHAPE, never);
  failing = "network.down";
  await expect(places.release(first.record, {})).rejects.toThrow("network.down");
  failing = undefined;
  await places.retryLeaving();
  expect(places.leavingCount).toBe(0);

  const second = await places.make(SHAPE, never);
  expect(second.record.slot).toBe(first.record.slot);
  const before = machine.traces();
  effects.clear();
  await places.release(first.record, {});
  expect(effects).toEqual(new Set());
  expect(machine.traces()).toEqual(before);
  expect(places.slots.has(second.record.slot)).toBe(true);

  await places.release(second.record, {});
  expect(places.slots.takenCount).toBe(0);
  await manager.close();
});

test("a left VM that cannot be adopted is killed, and its place goes", async () => {
  const machine = openSimulatedMachine(root);
  const { core, manager } = await openCore(machine.deps);
  const before = machine.traces();
  // Held by the pool's own handle, as by a connection that nobody gives up.
  const { place } = await core.pool.take(machine.warm, never);
  await core.pool.places.release(place.record, {});
  expect(machine.processes.all()).toEqual([]);
  expect(machine.traces()).toEqual(before);
  await manager.close();
});
