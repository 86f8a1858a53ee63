import { rmSync } from "node:fs";
import { afterEach, beforeEach, expect, test, vi } from "vitest";
import type { SandboxEntry } from "./core.ts";
import { openCore } from "./index.ts";
import {
  newRoot,
  openSimulatedMachine,
  operationOf,
  sandboxId,
  snapshotId,
  specOf,
  type SimulatedMachine,
  type SimulatedMachineOptions,
} from "./testing/simulated-machine.ts";

const A = sandboxId("a");
const B = sandboxId("b");
const SNAP = snapshotId("s");

let root: string;
const opened: { close(): Promise<void> }[] = [];

beforeEach(() => {
  root = newRoot();
});
afterEach(async () => {
  for (const manager of opened.splice(0)) await manager.close();
  rmSync(root, { recursive: true, force: true });
});

async function start(options: SimulatedMachineOptions = {}) {
  const machine = openSimulatedMachine(root, options);
  const { core, manager } = await openCore(machine.deps);
  opened.push(manager);
  return { machine, core, manager };
}

function guestOf(machine: SimulatedMachine, entry: SandboxEntry | undefined) {
  const process = machine.processes.get(entry!.placed!.vm.record.pid)!;
  expect(process.corrupt).toBe(false);
  return process;
}

/** As a program in the guest would keep it. */
function remember(
  machine: SimulatedMachine,
  entry: SandboxEntry | undefined,
  key: string,
  value: string,
): void {
  const process = guestOf(machine, entry);
  machine.processes.set({
    ...process,
    guest: { ...process.guest, memory: { ...process.guest.memory, [key]: value } },
  });
}

test("a sandbox goes through its whole life and leaves nothing", async () => {
  const { machine, core, manager } = await start();
  const before = machine.traces();
  await manager.create(specOf(A), operationOf(A, 1));
  const entry = core.sandboxes.get(A);
  remember(machine, entry, "counter", "7");
  expect(await manager.get(A)).toMatchObject({ phase: "running", generation: 1n });

  expect(await manager.pause(operationOf(A, 2))).toMatchObject({ phase: "paused" });
  expect(machine.processes.all()).toEqual([]);
  expect(await manager.resume(operationOf(A, 3))).toMatchObject({ phase: "running" });
  expect(guestOf(machine, entry).guest).toMatchObject({ runs: 3, memory: { counter: "7", sandboxId: A } });

  await manager.createSnapshot(operationOf(A, 3), SNAP, "team-1");
  await manager.create(specOf(B, { source: { kind: "snapshot", snapshotId: SNAP } }), operationOf(B, 1));
  const child = guestOf(machine, core.sandboxes.get(B));
  expect(child.guest.memory).toMatchObject({ counter: "7", sandboxId: B });
  expect(child.guest.memory["machineId"]).not.toBe(guestOf(machine, entry).guest.memory["machineId"]);

  await manager.destroy(operationOf(A, 4));
  await manager.deleteSnapshot(SNAP);
  expect(await manager.pause(operationOf(B, 2))).toMatchObject({ phase: "paused" });
  expect(await manager.resume(operationOf(B, 3))).toMatchObject({ phase: "running" });
  guestOf(machine, core.sandboxes.get(B));
  await manager.destroy(operationOf(B, 4));
  expect(machine.traces()).toEqual(before);
});

test("the outline says what a list says, without a look at the disks", async () => {
  const looked: string[] = [];
  const { machine, manager } = await start();
  await manager.create(specOf(A), operationOf(A, 1));
  await manager.create(specOf(B), operationOf(B, 1));
  await manager.pause(operationOf(B, 2));
  const listed = (await manager.list({ limit: 10 })).items;
  vi.spyOn(machine.deps.rootDisk, "allocatedBytes").mockImplementation(async ({ dir }) => {
    looked.push(dir);
    return 0;
  });
  expect(manager.outline()).toEqual(listed.map(({ id, phase, generation }) => ({ id, phase, generation })));
  expect(manager.outline().map(({ phase }) => phase)).toEqual(["running", "paused"]);
  expect(looked).toEqual([]);
});

test("an older generation is refused, the same one is answered again", async () => {
  const { core, manager } = await start();
  const first = manager.create(specOf(A), operationOf(A, 5));
  const second = manager.create(specOf(A), operationOf(A, 5));
  expect(await second).toEqual(await first);
  await expect(manager.create(specOf(A), operationOf(A, 6))).rejects.toMatchObject({
    code: "already_exists",
  });
  await expect(manager.pause(operationOf(A, 4))).rejects.toMatchObject({ code: "stale_generation" });
  await manager.pause(operationOf(A, 7));
  expect(await manager.pause(operationOf(A, 7))).toMatchObject({ phase: "paused" });
  await expect(manager.resume(operationOf(A, 7))).rejects.toMatchObject({ code: "stale_generation" });
  await expect(manager.pause(operationOf(A, 8))).rejects.toMatchObject({ code: "wrong_state" });
  await expect(manager.pause(operationOf(A, 8))).rejects.toMatchObject({ code: "wrong_state" });
  await manager.destroy(operationOf(A, 9));
  await manager.destroy(operationOf(A, 9));
  await expect(manager.create(specOf(A), operationOf(A, 9))).rejects.toMatchObject({
    code: "stale_generation",
  });
  expect(core.sandboxes.size).toBe(0);
});

test("of two resumes at once only those are let in whose memory there is", async () => {
  const { manager } = await start({ config: { memoryBudgetMb: 512 } });
  for (const id of [A, B]) {
    await manager.create(specOf(id), operationOf(id, 1));
    await manager.pause(operationOf(id, 2));
  }
  const results = await Promise.allSettled([A, B].map((id) => manager.resume(operationOf(id, 3))));
  expect(results).toMatchObject([
    { status: "fulfilled" },
    { status: "rejected", reason: { code: "no_capacity" } },
  ]);
  await manager.pause(operationOf(A, 4));
  expect(await manager.resume(operationOf(B, 4))).toMatchObject({ phase: "running" });
});

test("a lifetime that could not be written down is not in force", async () => {
  const { core, manager } = await start();
  await manager.create(specOf(A), operationOf(A, 1));
  const before = await manager.get(A);
  const full = Object.assign(new Error("full"), { code: "ENOSPC" });
  vi.spyOn(core.journal, "writeSandbox").mockRejectedValueOnce(full);
  await expect(manager.update(A, { timeoutSec: 60, onTimeout: "pause", mode: "idle" })).rejects.toThrow(
    "full",
  );
  expect((await manager.get(A)).lifetime).toEqual(before.lifetime);
});

test("a create that comes after its destroy does nothing", async () => {
  const { manager } = await start();
  await manager.destroy(operationOf(A, 2));
  await expect(manager.create(specOf(A), operationOf(A, 1))).rejects.toMatchObject({
    code: "stale_generation",
  });
});

test("a destroy ends a create that is under way", async () => {
  const { machine, manager } = await start();
  const before = machine.traces();
  const creating = manager.create(specOf(A), operationOf(A, 1));
  const destroying = manager.destroy(operationOf(A, 2));
  await expect(creating).rejects.toMatchObject({ code: "wrong_state" });
  await destroying;
  expect(machine.traces()).toEqual(before);
  await expect(manager.get(A)).rejects.toMatchObject({ code: "not_found" });
});

test("a guest that ends by itself fails its sandbox, and the event says why", async () => {
  const { machine, core, manager } = await start();
  await manager.create(specOf(A), operationOf(A, 1));
  const using = Promise.withResolvers<AbortSignal>();
  const used = manager.withEnvd(A, async (_target, signal) => {
    using.resolve(signal);
    await new Promise((resolve) => signal.addEventListener("abort", resolve, { once: true }));
    throw signal.reason;
  });
  await using.promise;
  machine.vmm.crash(core.sandboxes.get(A)!.placed!.vm.record.pid, {
    reason: "guest_crashed",
    message: "panic",
  });
  await expect(used).rejects.toMatchObject({ code: "guest_error" });
  await vi.waitFor(async () => expect(await manager.get(A)).toMatchObject({ phase: "failed" }));
  await vi.waitFor(() => expect(manager.events.lastNumber).toBe(1n));
  await vi.waitFor(() =>
    expect(machine.traces().filter((path) => path.includes("host/"))).not.toContain("host/networks/0"),
  );
  const events = [];
  for await (const event of manager.events.read({
    after: 0n,
    follow: false,
    signal: new AbortController().signal,
  }))
    events.push(event);
  expect(events).toMatchObject([{ sandboxId: A, kind: "failed", reason: "guest_crashed", generation: 1n }]);
  await expect(manager.withEnvd(A, async () => undefined)).rejects.toMatchObject({ code: "wrong_state" });
  await manager.destroy(operationOf(A, 2));
});

test("a disk that is larger than the template's is enlarged by the VMM, which tells its guest", async () => {
  const { machine, core, manager } = await start();
  await manager.create(specOf(A, { diskMb: 8192 }), operationOf(A, 1));
  const entry = core.sandboxes.get(A);
  expect(entry?.disk?.sizeBytes).toBe(8192 * (1 << 20));
  expect(guestOf(machine, entry).disk.sizeBytes).toBe(8192 * (1 << 20));
  await expect(manager.create(specOf(B, { diskMb: 1024 }), operationOf(B, 1))).rejects.toMatchObject({
    code: "unsupported_shape",
    details: { field: "disk_mb" },
  });
});

test("memory and disk are not given twice", async () => {
  let free = 2 ** 40;
  const { manager } = await start({ config: { memoryBudgetMb: 1024 }, freeDiskBytes: () => free });
  await manager.create(specOf(A), operationOf(A, 1));
  await manager.create(specOf(B), operationOf(B, 1));
  const C = sandboxId("c");
  await expect(manager.create(specOf(C), operationOf(C, 1))).rejects.toMatchObject({ code: "no_capacity" });
  await manager.pause(operationOf(B, 2));
  free = 0;
  await expect(manager.create(specOf(C), operationOf(C, 2))).rejects.toMatchObject({ code: "out_of_disk" });
  await expect(manager.resume(operationOf(B, 3))).rejects.toMatchObject({ code: "out_of_disk" });
  free = 2 ** 40;
  await manager.create(specOf(C), operationOf(C, 3));
  await expect(manager.resume(operationOf(B, 4))).rejects.toMatchObject({ code: "no_capacity" });
});

test("an idle sandbox is paused when its time is over, and not under an open use", async () => {
  const { core, manager } = await start({ config: { reaperIntervalMs: 5 } });
  const lifetime = { timeoutSec: 1, onTimeout: "pause" as const, mode: "idle" as const };
  await manager.create(specOf(A, { lifetime }), operationOf(A, 1));
  const entry = core.sandboxes.get(A)!;
  const release = Promise.withResolvers<void>();
  const use = manager.withEnvd(A, () => release.promise);
  entry.lastActivityMs -= 10_000;
  const rounds = vi.fn<() => void>();
  await new Promise<void>((resolve) => core.deps.clock.after(30, resolve)).then(rounds);
  expect(entry.phase).toBe("running");
  release.resolve();
  await use;
  entry.lastActivityMs -= 10_000;
  await vi.waitFor(() => expect(entry.phase).toBe("paused"));
  await vi.waitFor(() => expect(manager.events.lastNumber).toBe(1n));
});

test("the pool keeps its size, through a burst and a death", async () => {
  const pool = {
    size: 2,
    image: "base",
    shape: { vcpus: 1, memoryMb: 512 },
    refillConcurrency: 2,
    refillYieldMs: 20,
  };
  const { machine, core, manager } = await start({ config: { pool } });
  core.pool.keep(machine.warm, 2);
  await vi.waitFor(() => expect(core.pool.waitingCount).toBe(2));
  const ids = Array.from({ length: 6 }, (_, index) => sandboxId(`x${index}`));
  await Promise.all(ids.map((id) => manager.create(specOf(id), operationOf(id, 1))));
  await vi.waitFor(() => expect(core.pool.waitingCount).toBe(2));
  expect(machine.processes.all().length).toBe(8);
  const victim = machine.processes.all().find(({ place }) => core.pool.waitingIds().includes(place.vmId))!;
  machine.vmm.crash(victim.pid, { reason: "vmm_exited", message: "gone" });
  await vi.waitFor(
    () => {
      expect(core.pool.waitingIds()).not.toContain(victim.place.vmId);
      expect(core.pool.waitingCount).toBe(2);
    },
    { timeout: 4_000 },
  );
  expect(await manager.destroyAll()).toEqual([]);
  expect(machine.processes.all().length).toBe(2);
});

test("a resume whose guest does not answer goes back to paused, with what the guest did meanwhile", async () => {
  let broken = false;
  const { machine, core, manager } = await start({
    trouble: (effect) => {
      if (broken && effect === "guest.init") throw new Error("envd is gone");
    },
  });
  await manager.create(specOf(A), operationOf(A, 1));
  await manager.pause(operationOf(A, 2));
  broken = true;
  await expect(manager.resume(operationOf(A, 3))).rejects.toMatchObject({ code: "host_error" });
  expect(await manager.get(A)).toMatchObject({ phase: "paused" });
  expect(machine.processes.all()).toEqual([]);
  broken = false;
  await manager.resume(operationOf(A, 4));
  // Twice it began to run after the pause: nothing was lost, and disk and memory fit.
  expect(guestOf(machine, core.sandboxes.get(A)).guest.runs).toBe(4);
});
