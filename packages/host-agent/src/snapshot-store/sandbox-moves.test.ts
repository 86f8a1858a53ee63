/** A paused sandbox goes on on another host, through the store, as the control plane has it done. */
import assert from "node:assert/strict";
import { rmSync } from "node:fs";
import { afterEach, beforeEach, expect, test, vi } from "vitest";
import { FAILPOINTS } from "../sandbox-manager/operations.ts";
import type { Stage } from "../sandbox-manager/testing/scenarios.ts";
import {
  newRoot,
  operationOf,
  sandboxId,
  snapshotId,
  specOf,
} from "../sandbox-manager/testing/simulated-machine.ts";
import { SharingHosts } from "./testing/sharing-hosts.ts";

vi.setConfig({ testTimeout: 120_000 });
const ID = sandboxId("moving");
let root: string;
let hosts: SharingHosts;

beforeEach(() => {
  root = newRoot();
  hosts = new SharingHosts(root);
});
afterEach(() => rmSync(root, { recursive: true, force: true }));

function processOf({ core, machine }: Stage) {
  return machine.processes.get(core.sandboxes.get(ID)!.placed!.vm.record.pid)!;
}

/** Paused, with something in its memory. */
async function pausedOn(stage: Stage): Promise<void> {
  await stage.manager.create(specOf(ID), operationOf(ID, 1));
  const process = processOf(stage);
  const memory = { ...process.guest.memory, counter: "7" };
  stage.machine.processes.set({ ...process, guest: { ...process.guest, memory } });
  await stage.manager.pause(operationOf(ID, 2));
}

async function send(stage: Stage, generation: number, name: string): Promise<void> {
  const id = snapshotId(name);
  await stage.manager.createSnapshot(operationOf(ID, generation), id, "team-1");
  await vi.waitFor(() => assert.ok(stage.core.snapshots.get(id)?.storeId), { timeout: 60_000 });
}

const start = (stage: Stage, generation: number, name: string) =>
  stage.manager.create(
    specOf(ID, { source: { kind: "snapshot", snapshotId: snapshotId(name) } }),
    operationOf(ID, generation),
  );

function expectSame(stage: Stage, machineId: string): void {
  const process = processOf(stage);
  // `corrupt`: its memory and its disk did not fit.
  expect(process).toMatchObject({ state: "running", corrupt: false });
  expect(process.guest.memory).toMatchObject({ counter: "7", sandboxId: ID, machineId });
}

/** Nothing of it, and nothing that it needed, is left. */
function expectGone({ core }: Stage, host: string): void {
  assert.equal(core.sandboxes.size, 0);
  assert.equal(core.snapshots.size, 0);
  for (const folder of ["sandboxes", "snapshots", "layers"]) expect(hosts.names(host, folder)).toEqual([]);
}

test("it has its memory, its disk and its machine id there, and the former host forgets it", async () => {
  const [a, b] = [await hosts.open("a"), await hosts.open("b")];
  await pausedOn(a);
  const { machineId } = a.core.sandboxes.get(ID)!.record;
  await send(a, 3, "out");
  await start(b, 4, "out");
  expectSame(b, machineId);
  await a.manager.destroy(operationOf(ID, 5));
  for (const { manager } of [a, b]) await manager.deleteSnapshot(snapshotId("out"));
  expectGone(a, "a");
  // Its former host would run it by no command that is still on its way.
  await assert.rejects(a.manager.resume(operationOf(ID, 3)), { code: "stale_generation" });

  // What it is made of there stays its own: it pauses, resumes, and goes back.
  await b.manager.pause(operationOf(ID, 6));
  await b.manager.resume(operationOf(ID, 7));
  expectSame(b, machineId);
  await b.manager.pause(operationOf(ID, 8));
  await send(b, 9, "back");
  await start(a, 10, "back");
  expectSame(a, machineId);
  await b.manager.destroy(operationOf(ID, 11));
  for (const { manager } of [a, b]) await manager.deleteSnapshot(snapshotId("back"));
  expectGone(b, "b");
});

test("a sandbox of another id that is made of it is a clone", async () => {
  const a = await hosts.open("a");
  await pausedOn(a);
  await send(a, 3, "out");
  const clone = sandboxId("clone");
  const source = { kind: "snapshot" as const, snapshotId: snapshotId("out") };
  await a.manager.create(specOf(clone, { source }), operationOf(clone, 1));
  const machineIdOf = (id: typeof ID) => a.core.sandboxes.get(id)!.record.machineId;
  assert.notEqual(machineIdOf(clone), machineIdOf(ID));
});

const SENDING = FAILPOINTS.filter((name) => /^snapshot-(paused|done)\./.test(name));
const STARTING = FAILPOINTS.filter((name) => /^created?\./.test(name));

test.each(SENDING)("a failure at %s leaves it as it was", async (failpoint) => {
  const a = await hosts.open("a");
  await pausedOn(a);
  const { machineId } = a.core.sandboxes.get(ID)!.record;
  a.machine.deps.failpoints.arm(failpoint, "error", 1);
  const sending = a.manager.createSnapshot(operationOf(ID, 3), snapshotId("out"), "team-1");
  await (failpoint.startsWith("snapshot-done") ? sending : assert.rejects(sending));
  await a.manager.deleteSnapshot(snapshotId("out"));
  await a.manager.resume(operationOf(ID, 3));
  expectSame(a, machineId);
});

test.each(STARTING)(
  "the other host dies at %s: it runs there or never will, and its copy is good",
  async (at) => {
    const a = await hosts.open("a");
    await pausedOn(a);
    const { machineId } = a.core.sandboxes.get(ID)!.record;
    await send(a, 3, "out");
    const b = await hosts.open("b");
    const { failpoints } = b.machine.deps;
    failpoints.arm(at, "halt", 1);
    void start(b, 4, "out");
    expect(await failpoints.halted).toBe(at);
    const again = await hosts.open("b");
    const entry = again.core.sandboxes.get(ID);
    if (entry?.phase === "running") return expectSame(again, machineId);
    // As the control plane does it before it goes back to the copy: no late command brings it up.
    await again.manager.destroy(operationOf(ID, 5));
    await assert.rejects(start(again, 4, "out"), { code: "stale_generation" });
    await again.manager.deleteSnapshot(snapshotId("out"));
    expectGone(again, "b");
    await a.manager.deleteSnapshot(snapshotId("out"));
    await a.manager.resume(operationOf(ID, 6));
    expectSame(a, machineId);
  },
);
