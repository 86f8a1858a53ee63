/**
 * The agent dies by SIGKILL before and after each effect of each operation, in
 * a process of its own; the next one finds all sandboxes, and nothing leaked.
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
  const machine = openSimulatedMachine(root, { seed: 99 });
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

describe.each(SCENARIOS.map((scenario) => [scenario.name, scenario] as const))("%s", (name, scenario) => {
  const points = FAILPOINTS.filter((point) =>
    scenario.operations.some((list) => point.startsWith(`${list}.`)),
  );

  test.concurrent.each(points)("survives a SIGKILL at %s", { timeout: 60_000 }, async (point) => {
    const root = newRoot();
    roots.add(root);
    expect(await runAgent(root, "prepare", name, point)).toBe("SIGKILL");
    await expectRecovered(root, scenario);
  });
});

test("survives a SIGKILL in the recovery from a SIGKILL", { timeout: 120_000 }, async () => {
  const cases = [
    ["pause", "retire.kill-vm.after", "retire.detach-disk.after"],
    ["pause", "retire.release-place.before", "retire.journal-retired.before"],
    ["resume", "resume.take-vm.after", "retire.drop-other-layers.before"],
    ["create", "create.thaw.after", "destroy.remove-disk.after"],
    ["create", "create.give-disk.after", "destroy.write-tombstone.after"],
    ["destroy of a paused sandbox", "destroy.remove-disk.before", "destroy.remove-record.before"],
  ] as const;
  for (const [name, first, second] of cases) {
    const root = newRoot();
    roots.add(root);
    expect(await runAgent(root, "prepare", name, first)).toBe("SIGKILL");
    expect(await runAgent(root, "recover", second)).toBe("SIGKILL");
    await expectRecovered(
      root,
      SCENARIOS.find((scenario) => scenario.name === name)!,
    );
  }
});
