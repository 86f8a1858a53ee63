/**
 * Each step of each operation fails once, before and after its effect, and each
 * effect on the host fails once in its middle; every undo runs twice.
 */
import { rmSync } from "node:fs";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from "vitest";
import { openCore } from "./index.ts";
import { FAILPOINTS, OPERATIONS } from "./operations.ts";
import type { Step } from "./steps.ts";
import {
  destroyEverything,
  expectNothingLeaked,
  expectOldIntact,
  expectSnapshotsUsable,
} from "./testing/expectations.ts";
import { NEW, SCENARIOS, SNAP, type Scenario, type Stage } from "./testing/scenarios.ts";
import { newRoot, openSimulatedMachine } from "./testing/simulated-machine.ts";
import { tidy } from "./watches.ts";

/** What follows a commit point: its failure is no failure of the command. */
const FORWARD = /^(created|retire|resumed|snapshot-done)\./;

let root: string;
const reached = new Set<string>();
const undos: { step: Step<never>; undo: Step<never>["undo"] }[] = [];

beforeAll(() => {
  for (const steps of Object.values(OPERATIONS) as Step<never>[][]) {
    for (const step of steps) {
      const undo = step.undo?.bind(step);
      if (undo === undefined || undos.some((known) => known.step === step)) continue;
      undos.push({ step, undo });
      step.undo = async (ctx, signal) => {
        await undo(ctx, signal);
        await undo(ctx, signal);
      };
    }
  }
});
afterAll(() => {
  for (const { step, undo } of undos) step.undo = undo;
});
beforeEach(() => {
  root = newRoot();
});
afterEach(() => {
  rmSync(root, { recursive: true, force: true });
});

/** Plays the scenario with one failure, and demands that nothing was lost or leaked. */
async function playWithFailure(
  scenario: Scenario,
  arm: (stage: Stage) => { disarm: () => void },
  options: { trouble?: (effect: string) => void; mayPass: boolean },
): Promise<void> {
  const machine = openSimulatedMachine(root, {
    ...(options.trouble !== undefined && { trouble: options.trouble }),
    config: { retryIntervalMs: 3_600_000 },
  });
  const stage: Stage = { machine, ...(await openCore(machine.deps)) };
  const { core, manager } = stage;
  try {
    await scenario.prepare(stage);
    const { disarm } = arm(stage);
    const outcome = await scenario.act(stage).then(
      () => "passed",
      () => "failed",
    );
    disarm();
    if (!options.mayPass) expect(outcome).toBe("failed");
    if (scenario.operations.includes("destroy")) {
      if (outcome === "failed" && core.sandboxes.has(NEW))
        expect((await manager.get(NEW)).phase).toBe("stopping");
    } else if (scenario.operations.includes("create")) {
      expect(core.sandboxes.get(NEW)?.phase).toBe(outcome === "passed" ? "running" : undefined);
    } else if (scenario.name.startsWith("snapshot")) {
      expect(core.snapshots.has(SNAP)).toBe(outcome === "passed");
    }
    // What was left to the janitor is done by its next round.
    await tidy(core);
    expectNothingLeaked(stage);
    if (scenario.operations.includes("destroy")) expect(core.sandboxes.has(NEW)).toBe(false);
    await expectOldIntact(stage);
    await expectSnapshotsUsable(stage);
    expectNothingLeaked(stage);
    await destroyEverything(stage);
    for (const name of machine.deps.failpoints.hits) reached.add(name);
  } finally {
    await manager.close();
  }
}

describe.each(SCENARIOS.map((scenario) => [scenario.name, scenario] as const))("%s", (_name, scenario) => {
  const points = FAILPOINTS.filter((point) =>
    scenario.operations.some((name) => point.startsWith(`${name}.`)),
  );

  test.each(points)("survives an error at %s", async (point) => {
    const arm = ({ machine }: Stage) => {
      machine.deps.failpoints.arm(point, "error", 1);
      return { disarm: () => machine.deps.failpoints.disarmAll() };
    };
    await playWithFailure(scenario, arm, { mayPass: FORWARD.test(point) });
    expect(reached).toContain(point);
  });

  test("survives a failure of the host in each of its effects", async () => {
    const effects = new Set<string>();
    let armed = false;
    let failing: string | undefined;
    const trouble = (effect: string) => {
      if (!armed) return;
      effects.add(effect);
      if (effect !== failing) return;
      armed = false;
      throw new Error(`trouble in ${effect}`);
    };
    const arm = () => {
      armed = true;
      return { disarm: () => void (armed = false) };
    };
    await playWithFailure(scenario, arm, { trouble, mayPass: true });
    // A freeze is the VMM's alone.
    if (!scenario.operations.includes("hold")) expect(effects.size).toBeGreaterThan(0);
    for (failing of [...effects]) {
      rmSync(root, { recursive: true });
      await playWithFailure(scenario, arm, { trouble, mayPass: true });
    }
  });
});
