import { rmSync } from "node:fs";
import { afterEach, beforeEach, expect, test } from "vitest";
import { systemClock } from "./clock.ts";
import type { GuestAgent } from "./guest.ts";
import { openCore } from "./index.ts";
import {
  newRoot,
  openSimulatedMachine,
  operationOf,
  sandboxId,
  specOf,
  type SimulatedMachineOptions,
} from "./testing/simulated-machine.ts";

const A = sandboxId("a");

let root: string;
let skippedMs: number;
/** By how much waiting is shorter than it would be. */
let haste: number;
const closing: (() => Promise<void>)[] = [];

beforeEach(() => {
  root = newRoot();
  skippedMs = 0;
  haste = 1;
});
afterEach(async () => {
  for (const close of closing.splice(0)) await close();
  rmSync(root, { recursive: true, force: true });
});

/** One sandbox that runs, and how often its guest was asked and initialised. */
async function start(
  options: SimulatedMachineOptions & { guest?: (real: GuestAgent) => Partial<GuestAgent> } = {},
) {
  const counts = { init: 0, knowsToken: 0 };
  const machine = openSimulatedMachine(root, {
    ...options,
    clock: {
      ...systemClock,
      nowMs: () => Date.now() + skippedMs,
      after: (delayMs, run) => systemClock.after(delayMs / haste, run),
    },
    trouble: (effect) => {
      if (effect === "guest.init") counts.init += 1;
      if (effect === "guest.knowsToken") counts.knowsToken += 1;
      options.trouble?.(effect);
    },
  });
  const real = machine.deps.guest;
  const guest: GuestAgent = {
    init: (...args) => real.init(...args),
    knowsToken: (...args) => real.knowsToken(...args),
    release: (...args) => real.release(...args),
    ...options.guest?.(real),
  };
  const { core, manager } = await openCore({ ...machine.deps, guest });
  closing.push(() => manager.close());
  await manager.create(specOf(A), operationOf(A, 1));
  counts.init = 0;
  const process = () => machine.processes.get(core.sandboxes.get(A)!.placed!.vm.record.pid)!;
  return {
    manager,
    core,
    counts,
    memory: () => process().guest.memory,
    /** envd's, not the guest's: what else is in memory stays. */
    crashEnvd: () => {
      const { accessToken: _, restoreId: __, ...rest } = process().guest.memory;
      machine.processes.set({ ...process(), guest: { ...process().guest, memory: rest } });
    },
  };
}

/** Answers only when its question is given up. */
const silent: GuestAgent["knowsToken"] = (_target, signal) =>
  new Promise((_resolve, reject) => {
    signal.addEventListener("abort", () => reject(signal.reason as Error), { once: true });
  });

test("an envd that was started again gets its identity again, by another restore of the same guest", async () => {
  const { manager, core, counts, memory, crashEnvd } = await start();
  const before = memory();
  const vm = core.sandboxes.get(A)!.placed!.vm.record;
  crashEnvd();
  expect(await manager.reviveGuest(A)).toBe(true);
  expect(counts.init).toBe(1);
  expect(memory()).toMatchObject({ sandboxId: A, accessToken: before["accessToken"] });
  expect(memory()["machineId"]).toBe(before["machineId"]);
  expect(memory()["restoreId"]).not.toBe(before["restoreId"]);
  expect(core.sandboxes.get(A)!.placed!.vm.record).toEqual(vm);
});

test("an envd that knows its sandbox is left alone", async () => {
  const { manager, counts, memory } = await start();
  const before = memory();
  expect(await manager.reviveGuest(A)).toBe(true);
  expect(counts).toEqual({ init: 0, knowsToken: 1 });
  expect(memory()).toEqual(before);
});

test("all who call at once wait for one revival", async () => {
  const { manager, counts, crashEnvd } = await start();
  crashEnvd();
  const answers = await Promise.all(Array.from({ length: 50 }, () => manager.reviveGuest(A)));
  expect(new Set(answers)).toEqual(new Set([true]));
  expect(counts).toEqual({ init: 1, knowsToken: 1 });
  // One whose failure is told late may go on too.
  expect(await manager.reviveGuest(A)).toBe(true);
  expect(counts).toEqual({ init: 1, knowsToken: 1 });
});

test("an envd that crashes again and again is looked at ever more rarely", async () => {
  const { manager, counts, crashEnvd } = await start();
  const call = async () => {
    crashEnvd();
    await manager.reviveGuest(A);
  };
  for (let round = 0; round < 100; round += 1) await call();
  expect(counts.init).toBe(1);
  // A call every second, for ten minutes: after 1, 2, 4 … 60 seconds, and then each minute.
  for (let round = 0; round < 600; round += 1) {
    skippedMs += 1_000;
    await call();
  }
  expect(counts.init).toBeGreaterThan(8);
  expect(counts.init).toBeLessThan(20);
  expect(counts.knowsToken).toBe(counts.init);

  skippedMs += 3_600_000;
  counts.init = 0;
  await call();
  skippedMs += 1_100;
  await call();
  expect(counts.init).toBe(2);
});

test("an init that fails is told, and tried again when its pause is over", async () => {
  let fails = false;
  const { manager, memory, crashEnvd } = await start({
    trouble: (effect) => {
      if (effect === "guest.init" && fails) throw new Error("no answer");
    },
  });
  crashEnvd();
  fails = true;
  expect(await manager.reviveGuest(A)).toBe(false);
  fails = false;
  expect(await manager.reviveGuest(A)).toBe(false);
  expect(memory()["accessToken"]).toBe(undefined);
  skippedMs += 1_100;
  expect(await manager.reviveGuest(A)).toBe(true);
  expect(memory()["accessToken"]).toBe(`token-of-${A}`);
});

test("a call that comes meanwhile waits for it, but not for ever", async () => {
  const answer = Promise.withResolvers<boolean>();
  const { manager, counts } = await start({ guest: () => ({ knowsToken: () => answer.promise }) });
  const revived = manager.reviveGuest(A);
  let used = 0;
  const call = manager.withEnvd(A, async () => {
    expect(counts.init).toBe(1);
    used += 1;
  });
  await new Promise((resolve) => setImmediate(resolve));
  expect(used).toBe(0);
  answer.resolve(false);
  expect(await revived).toBe(true);
  await call;
  expect(used).toBe(1);
});

test("a call that comes meanwhile does not wait for a guest that stays silent", async () => {
  const { manager } = await start({ guest: () => ({ knowsToken: silent }) });
  haste = 100;
  const revived = manager.reviveGuest(A);
  const first = await Promise.race([revived, manager.withEnvd(A, async () => "used")]);
  expect(first).toBe("used");
  expect(await revived).toBe(false);
});

test.each(["pause", "destroy"] as const)("a %s does not wait for a guest that is silent", async (command) => {
  const { manager, core, counts } = await start({ guest: () => ({ knowsToken: silent }) });
  const revived = manager.reviveGuest(A);
  await manager[command](operationOf(A, 2));
  expect(await revived).toBe(false);
  expect(core.sandboxes.get(A)?.phase).toBe(command === "pause" ? "paused" : undefined);
  expect(await manager.reviveGuest(A)).toBe(false);
  expect(counts.init).toBe(0);
});

test.each(["pause", "destroy"] as const)("a %s does not wait for an init that hangs", async (command) => {
  let hangs = false;
  const begun = Promise.withResolvers<void>();
  const { manager, core, crashEnvd } = await start({
    guest: (real) => ({
      async init(address, init, signal) {
        if (!hangs) return await real.init(address, init, signal);
        begun.resolve();
        await silent({ ...address, accessToken: "" }, signal);
      },
    }),
  });
  crashEnvd();
  hangs = true;
  const revived = manager.reviveGuest(A);
  await begun.promise;
  await manager[command](operationOf(A, 2));
  expect(await revived).toBe(false);
  expect(core.sandboxes.get(A)?.phase).toBe(command === "pause" ? "paused" : undefined);
});

test("what was paused and resumed meanwhile is not initialised by an older revival", async () => {
  const answer = Promise.withResolvers<boolean>();
  const { manager, counts, memory } = await start({ guest: () => ({ knowsToken: () => answer.promise }) });
  const revived = manager.reviveGuest(A);
  await manager.pause(operationOf(A, 2));
  await manager.resume(operationOf(A, 3));
  const { restoreId } = memory();
  counts.init = 0;
  answer.resolve(false);
  expect(await revived).toBe(false);
  expect(counts.init).toBe(0);
  expect(memory()["restoreId"]).toBe(restoreId);
});

test("an agent that ends does not wait for a guest that is silent", async () => {
  const { manager } = await start({ guest: () => ({ knowsToken: silent }) });
  const revived = manager.reviveGuest(A);
  await manager.close();
  expect(await revived).toBe(false);
});

test("a sandbox that is not here, or whose VM is dead, is not revived", async () => {
  const { manager } = await start();
  expect(await manager.reviveGuest(sandboxId("b"))).toBe(false);
  await manager.destroy(operationOf(A, 2));
  expect(await manager.reviveGuest(A)).toBe(false);
});
