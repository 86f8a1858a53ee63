import assert from "node:assert/strict";
import { test } from "vitest";
import type { SandboxId } from "../model/ids.ts";
import { isFinal, nextStatus } from "../model/sandbox-state.ts";
import { SANDBOX_STATUSES } from "../model/sandbox.ts";
import type { AgentPhase, AgentSandbox } from "./host-agent.ts";
import { judge } from "./judge.ts";

const PHASES: AgentPhase[] = ["starting", "running", "pausing", "paused", "resuming", "stopping", "failed"];

function seenAs(phase: AgentPhase): AgentSandbox {
  return {
    id: "sbaaaaaaaaaaaaaaaaaa" as SandboxId,
    phase,
    generation: 1n,
    vcpus: 1,
    memoryMb: 512,
    diskMb: 4096,
    diskUsedBytes: 0,
  };
}

const ENDED_UNSEEN: AgentSandbox = {
  ...seenAs("failed"),
  exit: { code: "ended_unseen", message: "It ended." },
};

test("every verdict is an arrow of the state table", () => {
  for (const status of SANDBOX_STATUSES) {
    for (const seen of [undefined, ENDED_UNSEEN, ...PHASES.map(seenAs)]) {
      const verdict = judge(status, seen);
      if (verdict.kind !== "move") continue;
      assert.ok(nextStatus(status, verdict.event), `${status} + ${verdict.event}`);
    }
  }
});

test("a host that holds nothing of a sandbox settles it, whatever its status", () => {
  for (const status of SANDBOX_STATUSES.filter((each) => !isFinal(each) && each !== "pending")) {
    const verdict = judge(status, undefined);
    assert.ok(verdict.kind === "move");
    assert.ok(isFinal(nextStatus(status, verdict.event) ?? "running"), status);
  }
});

test("what its host says about a sandbox at rest becomes its status", () => {
  for (const status of ["running", "paused", "missing"] as const) {
    for (const phase of ["running", "paused"] as const) {
      const verdict = judge(status, seenAs(phase));
      const after = verdict.kind === "move" ? nextStatus(status, verdict.event) : status;
      assert.equal(after, phase);
    }
  }
});

test("a VM that ended while its agent was away is stopped, and its row says so; any other failure is an error", () => {
  for (const status of ["running", "missing"] as const) {
    const unseen = judge(status, ENDED_UNSEEN);
    assert.ok(unseen.kind === "move" && nextStatus(status, unseen.event) === "stopped");
    assert.deepEqual(unseen.error, { code: "ended_unseen", message: "It ended." });
    const failed = judge(status, seenAs("failed"));
    assert.ok(failed.kind === "move" && nextStatus(status, failed.event) === "error");
  }
});

test("a pause that did not happen goes back to running and says so", () => {
  const verdict = judge("pausing", seenAs("running"));
  assert.ok(verdict.kind === "move" && verdict.event === "seenRunning" && verdict.error);
});

test("nothing that is to end is left alone", () => {
  for (const phase of PHASES) assert.equal(judge("stopping", seenAs(phase)).kind, "destroy");
});
