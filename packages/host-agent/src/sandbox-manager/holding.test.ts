import { rmSync } from "node:fs";
import { afterEach, beforeEach, expect, test, vi } from "vitest";
import { systemClock } from "./clock.ts";
import { openCore } from "./index.ts";
import type { Stage } from "./testing/scenarios.ts";
import { destroyEverything, expectNothingLeaked } from "./testing/expectations.ts";
import {
  newRoot,
  openSimulatedMachine,
  operationOf,
  sandboxId,
  snapshotId,
  specOf,
  type SimulatedMachineOptions,
} from "./testing/simulated-machine.ts";
import { reap, tidy } from "./watches.ts";

const IDS = ["a", "b", "c", "d", "e"].map(sandboxId);
const [A, B] = IDS as [(typeof IDS)[0], (typeof IDS)[0]];
const WHY = { reason: "control_plane_lost", message: "the host lost its control plane" };

let root: string;
const opened: { close(): Promise<void> }[] = [];

beforeEach(() => {
  root = newRoot();
});
afterEach(async () => {
  for (const manager of opened.splice(0)) await manager.close();
  rmSync(root, { recursive: true, force: true });
});

async function start(options: SimulatedMachineOptions = {}): Promise<Stage> {
  const machine = openSimulatedMachine(root, {
    ...options,
    config: { retryIntervalMs: 3_600_000, ...options.config },
  });
  const stage = { machine, ...(await openCore(machine.deps)) };
  opened.push(stage.manager);
  return stage;
}

async function restart(stage: Stage, options: SimulatedMachineOptions = {}): Promise<Stage> {
  opened.splice(opened.indexOf(stage.manager), 1);
  await stage.manager.close();
  return await start({ seed: 7, ...options });
}

const vmOf = ({ core }: Stage, id: (typeof IDS)[0]) => core.sandboxes.get(id)!.placed?.vm.state;
async function reported({ manager }: Stage): Promise<string[]> {
  const events = [];
  const { signal } = new AbortController();
  for await (const event of manager.events.read({ after: 0n, follow: false, signal })) {
    events.push(`${event.sandboxId} ${event.kind} ${event.reason}`);
  }
  return events;
}

test("all are paused at once within the work limit, past those that fail, and each is told", async () => {
  const stage = await start({ config: { workLimit: 2 } });
  const { manager, core, machine } = stage;
  for (const id of IDS) await manager.create(specOf(id), operationOf(id, 1));
  let atWork = 0;
  let most = 0;
  const met = Promise.withResolvers<void>();
  for (const id of IDS) {
    const { vm } = core.sandboxes.get(id)!.placed!;
    const capture = vm.captureLayer.bind(vm);
    vi.spyOn(vm, "captureLayer").mockImplementation(async (signal) => {
      most = Math.max(most, (atWork += 1));
      if (atWork === 2) met.resolve();
      await met.promise;
      atWork -= 1;
      if (id === B) throw new Error("it can't be read");
      return await capture(signal);
    });
  }
  const done = await manager.pauseAll(WHY);
  expect(most).toBe(2);
  expect(done.paused.sort()).toEqual(IDS.filter((id) => id !== B).sort());
  expect(done.frozen).toEqual([]);
  expect(done.failures).toMatchObject([{ id: B, error: { code: "host_error" } }]);
  expect(await manager.get(B)).toMatchObject({ phase: "running" });
  expect(await reported(stage)).toHaveLength(IDS.length - 1);
  vi.restoreAllMocks();
  expect(await manager.pauseAll(WHY)).toEqual({ paused: [B], frozen: [], failures: [] });
  expect(machine.processes.all()).toEqual([]);
});

test("where the disk is full, guests are stopped in memory, shown as that, and come back by a resume", async () => {
  let freeBytes = 2 ** 40;
  const stage = await start({ freeDiskBytes: () => freeBytes });
  const { manager } = stage;
  for (const id of [A, B]) await manager.create(specOf(id), operationOf(id, 1));
  freeBytes = 0;
  const done = await manager.pauseAll(WHY);
  expect(done).toMatchObject({ paused: [], failures: [] });
  expect(done.frozen.sort()).toEqual([A, B]);
  for (const id of [A, B]) {
    expect(vmOf(stage, id)).toBe("frozen");
    expect(await manager.get(id)).toMatchObject({ phase: "paused", inMemory: true, expiresAtUnixMs: 0 });
    expect(manager.outline()).toContainEqual({ id, phase: "paused", generation: 1n });
    await expect(manager.withEnvd(id, async () => undefined)).rejects.toMatchObject({
      code: "wrong_state",
      details: { status: "paused" },
    });
  }
  expect(await reported(stage)).toEqual([A, B].map((id) => `${id} paused control_plane_lost`));
  // Still without room: asked again and tidied up, they stay as they are.
  expect(await manager.pauseAll(WHY)).toEqual({ paused: [], frozen: [], failures: [] });
  await tidy(stage.core);
  expect(vmOf(stage, A)).toBe("frozen");

  const lifetime = { timeoutSec: 60, onTimeout: "pause" as const, mode: "idle" as const };
  const resumed = await manager.resume(operationOf(A, 2), lifetime);
  expect(resumed).toMatchObject({ phase: "running", inMemory: false, lifetime });
  expect(vmOf(stage, A)).toBe("running");
  expectNothingLeaked(stage);

  // And with room again, what still is in memory alone is paused for good.
  freeBytes = 2 ** 40;
  await tidy(stage.core);
  expect(await manager.get(B)).toMatchObject({ phase: "paused", inMemory: false });
  expect(vmOf(stage, B)).toBeUndefined();
  expect(await manager.resume(operationOf(B, 2))).toMatchObject({ phase: "running" });
  expectNothingLeaked(stage);
  await destroyEverything(stage);
});

test("a pause that runs out of room on its way ends as a guest in memory", async () => {
  const stage = await start();
  const { manager, core } = stage;
  await manager.create(specOf(A), operationOf(A, 1));
  const full = Object.assign(new Error("full"), { code: "ENOSPC" });
  vi.spyOn(core.sandboxes.get(A)!.placed!.vm, "captureLayer").mockRejectedValue(full);
  expect(await manager.pauseAll(WHY)).toEqual({ paused: [], frozen: [A], failures: [] });
  expect(vmOf(stage, A)).toBe("frozen");
  vi.restoreAllMocks();
});

test("not even the journal has room: the guest is stopped all the same, and written down later", async () => {
  const stage = await start({ freeDiskBytes: () => 0 });
  const { manager, core } = stage;
  await manager.create(specOf(A), operationOf(A, 1)).catch(() => undefined);
  expect(core.sandboxes.has(A)).toBe(false); // the reserve is for pauses
  const roomy = await restart(stage);
  await roomy.manager.create(specOf(A), operationOf(A, 2));
  const full = Object.assign(new Error("full"), { code: "ENOSPC" });
  const writes = vi.spyOn(roomy.core.journal, "writeSandbox").mockRejectedValue(full);
  expect(await roomy.manager.pauseAll(WHY)).toMatchObject({ frozen: [A], failures: [] });
  expect(vmOf(roomy, A)).toBe("frozen");
  writes.mockRestore();
  roomy.machine.deps.host.freeDiskBytes = async () => 0;
  await tidy(roomy.core);
  expect(await reported(roomy)).toEqual([`${A} paused control_plane_lost`]);
  const after = await restart(roomy, { freeDiskBytes: () => 0 });
  expect(await after.manager.get(A)).toMatchObject({ phase: "paused", inMemory: true });
  expect(vmOf(after, A)).toBe("frozen");
});

test("a stranger stands still through restarts of the agent, and goes on as it was with the time that it had", async () => {
  let nowMs = 1_000_000;
  const clock = { ...systemClock, nowMs: () => nowMs };
  let stage = await start({ clock });
  const lifetime = { timeoutSec: 100, onTimeout: "destroy" as const, mode: "absolute" as const };
  await stage.manager.create(specOf(A, { lifetime }), operationOf(A, 1, nowMs + 60_000));
  const { expiresAtUnixMs } = await stage.manager.get(A);
  nowMs += 10_000;
  expect(await stage.manager.freeze(A)).toMatchObject({ phase: "paused", inMemory: true, strangerForMs: 0 });
  nowMs += 80_000;
  expect(await stage.manager.freeze(A)).toMatchObject({ strangerForMs: 80_000 });
  stage = await restart(stage, { clock });
  nowMs += 80_000;
  reap(stage.core);
  await tidy(stage.core);
  expect(vmOf(stage, A)).toBe("frozen");
  expect(await stage.manager.get(A)).toMatchObject({ phase: "paused", strangerForMs: 160_000 });

  expect(await stage.manager.thaw(A)).toMatchObject({
    phase: "running",
    inMemory: false,
    expiresAtUnixMs: expiresAtUnixMs + 160_000,
  });
  expect((await stage.manager.get(A)).strangerForMs).toBeUndefined();
  expect(vmOf(stage, A)).toBe("running");
  // Twice is once.
  expect(await stage.manager.thaw(A)).toMatchObject({ phase: "running" });
});

test("a paused stranger is only marked, and a command for it takes the mark away", async () => {
  const stage = await start();
  const { manager } = stage;
  await manager.create(specOf(A), operationOf(A, 1));
  await manager.pause(operationOf(A, 2));
  expect(await manager.freeze(A)).toMatchObject({
    phase: "paused",
    inMemory: false,
    strangerForMs: expect.any(Number),
  });
  // Its digest differs from that of any row, so that it is looked at.
  expect(manager.outline()).toMatchObject([{ id: A, phase: "failed" }]);
  expect(await manager.resume(operationOf(A, 3))).not.toHaveProperty("strangerForMs");
  expect(manager.outline()).toMatchObject([{ id: A, phase: "running" }]);
  await manager.freeze(A);
  expect(await manager.pause(operationOf(A, 4))).not.toHaveProperty("strangerForMs");
  await manager.resume(operationOf(A, 5));
  await manager.freeze(A);
  await manager.destroy(operationOf(A, 6));
  expectNothingLeaked(stage);
  await expect(manager.freeze(B)).rejects.toMatchObject({ code: "not_found" });
});

test("a stranger that had no room to be paused is not let run by its thaw", async () => {
  const stage = await start();
  await stage.manager.create(specOf(A), operationOf(A, 1));
  stage.machine.deps.host.freeDiskBytes = async () => 0;
  await stage.manager.pauseAll(WHY);
  await stage.manager.freeze(A);
  expect(await stage.manager.thaw(A)).toMatchObject({ phase: "paused", inMemory: true });
  expect(vmOf(stage, A)).toBe("frozen");
});

test("a held guest is not snapshotted, and one that died is no longer held", async () => {
  const { manager, core, machine } = await start();
  await manager.create(specOf(A), operationOf(A, 1));
  await manager.freeze(A);
  const snapshot = manager.createSnapshot(operationOf(A, 2), snapshotId("s"), "team-1");
  await expect(snapshot).rejects.toMatchObject({ code: "wrong_state" });
  machine.vmm.crash(core.sandboxes.get(A)!.placed!.vm.record.pid, {
    reason: "vmm_exited",
    message: "killed by the kernel",
  });
  await expect.poll(async () => (await manager.get(A)).phase).toBe("failed");
});

test("a guest that does not answer when it goes on is held again", async () => {
  const { manager, core, machine } = await start();
  await manager.create(specOf(A), operationOf(A, 1));
  await manager.freeze(A);
  const init = vi.spyOn(machine.deps.guest, "init").mockRejectedValue(new Error("mute"));
  await expect(manager.thaw(A)).rejects.toMatchObject({ code: "host_error" });
  expect(core.sandboxes.get(A)!.placed!.vm.state).toBe("frozen");
  expect(await manager.get(A)).toMatchObject({
    phase: "paused",
    strangerForMs: expect.any(Number),
  });
  init.mockRestore();
  expect(await manager.thaw(A)).toMatchObject({ phase: "running" });
});

test("a host that ends leaves neither sandboxes nor snapshots", async () => {
  const stage = await start();
  const { manager, core } = stage;
  for (const id of [A, B]) await manager.create(specOf(id), operationOf(id, 1));
  await manager.createSnapshot(operationOf(A, 1), snapshotId("s"), "team-1");
  await manager.freeze(A);
  await manager.pause(operationOf(B, 2));
  expect(await manager.destroyEverything()).toEqual([]);
  expect([core.sandboxes.size, core.snapshots.size]).toEqual([0, 0]);
  expectNothingLeaked(stage);
});
