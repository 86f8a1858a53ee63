import { mkdirSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterEach, beforeEach, expect, test } from "vitest";
import type { Slot } from "../ids.ts";
import type { HostEvent } from "./sandbox.ts";
import { openCore } from "./index.ts";
import { destroyEverything, expectNothingLeaked, expectOldIntact } from "./testing/expectations.ts";
import { NEW, OLD, SCENARIOS, type Stage } from "./testing/scenarios.ts";
import { newRoot, openSimulatedMachine, operationOf, specOf } from "./testing/simulated-machine.ts";

let root: string;
const opened: Stage[] = [];

beforeEach(() => {
  root = newRoot();
});
afterEach(async () => {
  for (const { manager } of opened.splice(0)) await manager.close();
  rmSync(root, { recursive: true, force: true });
});

async function start(bootId = "boot-1"): Promise<Stage> {
  const machine = openSimulatedMachine(root, { bootId, config: { retryIntervalMs: 3_600_000 } });
  const stage = { machine, ...(await openCore(machine.deps)) };
  opened.push(stage);
  return stage;
}

async function eventsOf({ manager }: Stage): Promise<HostEvent[]> {
  const { signal } = new AbortController();
  return await Array.fromAsync(manager.events.read({ after: 0n, follow: false, signal }));
}

const prepare = (name: string) => (stage: Stage) =>
  SCENARIOS.find((scenario) => scenario.name === name)!.prepare(stage);

test("an agent that is started again has all its sandboxes", async () => {
  const first = await start();
  await prepare("create")(first);
  await first.manager.create(specOf(NEW), operationOf(NEW, 1));
  await first.manager.pause(operationOf(NEW, 2));
  const second = await start();
  expect((await second.manager.list({ limit: 10 })).items).toMatchObject([
    { id: NEW, phase: "paused", generation: 2n },
    { id: OLD, phase: "running", generation: 1n },
  ]);
  await expectOldIntact(second);
  expect(await second.manager.pause(operationOf(NEW, 2))).toMatchObject({ phase: "paused" });
  await expect(second.manager.resume(operationOf(NEW, 1))).rejects.toMatchObject({
    code: "stale_generation",
  });
  expect(await eventsOf(second)).toEqual([]);
});

test("an agent with another network driver does not start beside live VMs, and forgets those of an earlier boot", async () => {
  const first = await start();
  await prepare("create")(first);
  await first.manager.close();
  const startWith = async (bootId: string): Promise<Stage> => {
    const machine = openSimulatedMachine(root, { bootId, config: { retryIntervalMs: 3_600_000 } });
    const network: typeof machine.deps.network = { ...machine.deps.network, kind: "user" };
    network.down = () => Promise.reject(new Error("a lease of another driver"));
    const stage = { machine, ...(await openCore({ ...machine.deps, network })) };
    opened.push(stage);
    return stage;
  };
  await expect(startWith("boot-1")).rejects.toThrow(/ROOKERY_NETWORK=simulated.*ROOKERY_NETWORK=user/);
  expect((await start()).core.sandboxes.get(OLD)).toMatchObject({ phase: "running" });
  const later = await startWith("boot-2");
  expect(later.core.sandboxes.get(OLD)).toMatchObject({ phase: "failed" });
  expect(later.core.pool.places.leavingCount).toBe(0);
});

test("an agent that is started again with fewer slots adopts what is in the others, and removes what nobody owns", async () => {
  const first = await start();
  await prepare("create")(first);
  await first.manager.create(specOf(NEW), operationOf(NEW, 1));
  await first.core.deps.network.up(first.core.deps.network.plan(9 as Slot, 0), AbortSignal.timeout(5_000));
  const machine = openSimulatedMachine(root, { config: { retryIntervalMs: 3_600_000, maxSlots: 1 } });
  const { network } = machine.deps;
  const plan: typeof network.plan = (slot, uid) => {
    if (slot >= 1) throw new Error(`slot ${slot}: there are 1`);
    return network.plan(slot, uid);
  };
  const stage = { machine, ...(await openCore({ ...machine.deps, network: { ...network, plan } })) };
  opened.push(stage);
  expect((await stage.manager.list({ limit: 10 })).items).toMatchObject([
    { id: NEW, phase: "running" },
    { id: OLD, phase: "running" },
  ]);
  expectNothingLeaked(stage);
  await destroyEverything(stage);
});

test("after a restart of the host what ran has failed, and what was paused can be resumed", async () => {
  const first = await start();
  await prepare("resume")(first);
  await first.manager.create(specOf(NEW), operationOf(NEW, 1));
  for (const { pid } of first.machine.processes.all()) first.machine.processes.delete(pid);
  const second = await start("boot-2");
  expect(await second.manager.get(NEW)).toMatchObject({ phase: "failed", exit: { code: "host_restarted" } });
  expect(await eventsOf(second)).toMatchObject([
    { sandboxId: NEW, kind: "failed", reason: "host_restarted" },
  ]);
  await expectOldIntact(second);
  expectNothingLeaked(second);
  await destroyEverything(second);
});

test("what bears our mark and belongs to nobody goes", async () => {
  const first = await start();
  await prepare("create")(first);
  const before = first.machine.traces();
  const orphan = "vm0000000000000000";
  mkdirSync(join(root, "data", "vms", orphan, "run"), { recursive: true });
  mkdirSync(join(root, "sockets", orphan));
  mkdirSync(join(root, "data", "layers", "ly0000000000000000"));
  mkdirSync(join(root, "data", "snapshots", "snap-00000000000000000000", "layer"), { recursive: true });
  mkdirSync(join(root, "data", "sandboxes", NEW, "disk"), { recursive: true });
  writeFileSync(join(root, "host", "networks", "33"), "");
  writeFileSync(join(root, "host", "cgroups", `rookery-test_${orphan}`), "");
  const second = await start();
  expect(second.machine.traces()).toEqual(before);
  await expectOldIntact(second);
});

test("a record that cannot be read is set aside, and the others are not harmed by it", async () => {
  const first = await start();
  await prepare("create from a snapshot")(first);
  await first.manager.create(specOf(NEW), operationOf(NEW, 1));
  writeFileSync(join(root, "data", "sandboxes", NEW, "sandbox.json"), "{");
  const second = await start();
  await expect(second.manager.get(NEW)).rejects.toMatchObject({ code: "not_found" });
  expectNothingLeaked(second);
  await expectOldIntact(second);
});

test("a resume that the power cut is not tried again from a layer whose disk may have moved on", async () => {
  const first = await start();
  await prepare("resume")(first);
  first.machine.deps.failpoints.arm("resume.thaw.after", "halt", 1);
  void first.manager.resume(operationOf(OLD, 3));
  await first.machine.deps.failpoints.halted;
  for (const { pid } of first.machine.processes.all()) first.machine.processes.delete(pid);
  opened.pop(); // it never ends
  const second = await start("boot-2");
  expect(await second.manager.get(OLD)).toMatchObject({ phase: "failed", exit: { code: "host_restarted" } });
  expectNothingLeaked(second);
});

test("a VM that died in a resume before its guest ran leaves the sandbox paused", async () => {
  const first = await start();
  await prepare("resume")(first);
  first.machine.deps.failpoints.arm("resume.thaw.before", "halt", 1);
  void first.manager.resume(operationOf(OLD, 3));
  await first.machine.deps.failpoints.halted;
  for (const { pid } of first.machine.processes.all()) first.machine.processes.delete(pid);
  opened.pop(); // it never ends
  const second = await start();
  expect(await second.manager.get(OLD)).toMatchObject({ phase: "paused" });
  await expect(second.manager.resume(operationOf(OLD, 3))).rejects.toMatchObject({ code: "host_error" });
  await expectOldIntact(second);
});

test("a VM that died after its guest ran in a resume is not brought back", async () => {
  const first = await start();
  await prepare("resume")(first);
  first.machine.deps.failpoints.arm("resume.thaw.after", "halt", 1);
  void first.manager.resume(operationOf(OLD, 3));
  await first.machine.deps.failpoints.halted;
  for (const { pid } of first.machine.processes.all()) first.machine.processes.delete(pid);
  opened.pop(); // it never ends
  const second = await start();
  expect(await second.manager.get(OLD)).toMatchObject({ phase: "failed", exit: { code: "ended_unseen" } });
  expectNothingLeaked(second);
});
