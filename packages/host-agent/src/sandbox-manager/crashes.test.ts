/**
 * The agent dies before and after each effect of each operation; the next one
 * finds all sandboxes, and nothing leaked. Most deaths are halts in this process
 * (nothing else of that agent is at work, so nothing of it runs on); some of
 * each operation are SIGKILLs of a process of its own.
 */
import { spawn } from "node:child_process";
import { rmSync } from "node:fs";
import { join } from "node:path";
import { afterEach, describe, expect, test } from "vitest";
import { openCore } from "./index.ts";
import { FAILPOINTS } from "./operations.ts";
import {
  destroyEverything,
  expectNothingLeaked,
  expectOldIntact,
  expectSnapshotsUsable,
} from "./testing/expectations.ts";
import { NEW, SCENARIOS, SNAP, type Scenario, type Stage } from "./testing/scenarios.ts";
import { newRoot, openSimulatedMachine } from "./testing/simulated-machine.ts";

const AGENT = join(import.meta.dirname, "testing", "agent-process.ts");
const roots = new Set<string>();

afterEach(() => {
  for (const root of roots) rmSync(root, { recursive: true, force: true });
  roots.clear();
});

async function runAgent(...args: string[]): Promise<NodeJS.Signals | number> {
  const child = spawn(process.execPath, [AGENT, ...args], { stdio: ["ignore", "ignore", "pipe"] });
  let stderr = "";
  child.stderr.on("data", (data) => (stderr += String(data)));
  return await new Promise((resolve, reject) => {
    child.on("error", reject);
    child.on("close", (code, signal) => {
      if (code !== 0 && code !== null) reject(new Error(`the agent's process failed: ${stderr}`));
      else resolve(signal ?? 0);
    });
  });
}

/** What a new agent makes of the machine. */
async function expectRecovered(root: string, scenario: Scenario): Promise<void> {
  const machine = openSimulatedMachine(root, { seed: 99, config: { retryIntervalMs: 3_600_000 } });
  const stage: Stage = { machine, ...(await openCore(machine.deps)) };
  try {
    expectNothingLeaked(stage);
    if (scenario.operations.includes("destroy")) {
      // Either the command had not been accepted, or it was carried out.
      const left = stage.core.sandboxes.get(NEW);
      if (left !== undefined) expect(["running", "paused"]).toContain(left.phase);
    }
    const made = stage.core.snapshots.get(SNAP);
    if (made !== undefined) expect(made.sizeBytes).toBeGreaterThan(0);
    await expectOldIntact(stage);
    await expectSnapshotsUsable(stage);
    expectNothingLeaked(stage);
    await destroyEverything(stage);
  } finally {
    await stage.manager.close();
  }
}

/** Gives back a machine whose agent stopped for good at `failpoint`. */
async function haltAt(root: string, failpoint: string, scenario?: Scenario): Promise<void> {
  const machine = openSimulatedMachine(root, { config: { retryIntervalMs: 3_600_000 } });
  const { failpoints } = machine.deps;
  if (scenario === undefined) {
    failpoints.arm(failpoint, "halt", 1);
    void openCore(machine.deps);
  } else {
    const stage: Stage = { machine, ...(await openCore(machine.deps)) };
    await scenario.prepare(stage);
    failpoints.arm(failpoint, "halt", 1);
    void scenario.act(stage);
  }
  expect(await failpoints.halted).toBe(failpoint);
}

function pointsOf(scenario: Scenario): string[] {
  return FAILPOINTS.filter((point) => scenario.operations.some((list) => point.startsWith(`${list}.`)));
}

function makeRoot(): string {
  const root = newRoot();
  roots.add(root);
  return root;
}

describe.each(SCENARIOS.map((scenario) => [scenario.name, scenario] as const))("%s", (name, scenario) => {
  test.each(pointsOf(scenario))("survives the agent's end at %s", async (point) => {
    const root = makeRoot();
    await haltAt(root, point, scenario);
    await expectRecovered(root, scenario);
  });

  test("survives a SIGKILL", { timeout: 60_000 }, async () => {
    const root = makeRoot();
    // In the middle, where most is half done.
    const point = pointsOf(scenario)[Math.floor(pointsOf(scenario).length / 2)]!;
    expect(await runAgent(root, name, point)).toBe("SIGKILL");
    await expectRecovered(root, scenario);
  });
});

test.each([
  ["pause", "retire.kill-vm.after", "retire.detach-disk.after"],
  ["pause", "retire.release-place.before", "retire.journal-retired.before"],
  ["resume", "resume.take-vm.after", "retire.drop-other-layers.before"],
  ["create", "create.thaw.after", "destroy.remove-disk.after"],
  ["create", "create.give-disk.after", "destroy.write-tombstone.after"],
  ["destroy of a paused sandbox", "destroy.remove-disk.before", "destroy.remove-record.before"],
])("survives the agent's end in %s at %s, and then in the recovery at %s", async (name, first, second) => {
  const root = makeRoot();
  const scenario = SCENARIOS.find((one) => one.name === name)!;
  await haltAt(root, first, scenario);
  await haltAt(root, second);
  await expectRecovered(root, scenario);
});
