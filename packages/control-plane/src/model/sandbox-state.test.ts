import assert from "node:assert/strict";
import * as fc from "fast-check";
import { test } from "vitest";
import { type SandboxEvent, NEXT, isFinal, isWork, nextStatus } from "./sandbox-state.ts";
import { SANDBOX_STATUSES, type SandboxStatus } from "./sandbox.ts";

const EVENTS = [
  ...new Set(SANDBOX_STATUSES.flatMap((status) => Object.keys(NEXT[status]))),
] as SandboxEvent[];
const apply = (status: SandboxStatus, event: SandboxEvent): SandboxStatus =>
  nextStatus(status, event) ?? status;
const anyHistory = fc.array(fc.constantFrom(...EVENTS), { maxLength: 40 });

test("nothing wakes a final sandbox", () => {
  fc.assert(
    fc.property(fc.constantFrom<SandboxStatus>("stopped", "error"), anyHistory, (status, events) => {
      assert.equal(events.reduce(apply, status), status);
    }),
  );
});

test("a sandbox that was told to end can only end", () => {
  fc.assert(
    fc.property(anyHistory, (events) => {
      const end = events.reduce(apply, "stopping" as SandboxStatus);
      assert.ok(end === "stopping" || end === "stopped");
    }),
  );
});

test("whatever happened, a sandbox can be destroyed to its end", () => {
  fc.assert(
    fc.property(anyHistory, (events) => {
      const somewhere = events.reduce(apply, "pending" as SandboxStatus);
      assert.ok(isFinal(apply(apply(somewhere, "destroy"), "gone")));
    }),
  );
});

test("every status can be reached from pending", () => {
  const seen = new Set<SandboxStatus>(["pending"]);
  for (const status of seen) for (const next of Object.values(NEXT[status])) seen.add(next);
  assert.deepEqual([...seen].sort(), [...SANDBOX_STATUSES].sort());
});

test("every status of work has a way out by what a host says, and missing too", () => {
  for (const status of SANDBOX_STATUSES.filter((each) => isWork(each) || each === "missing")) {
    assert.ok(nextStatus(status, "died") ?? nextStatus(status, "gone"), `${status} could be stuck for ever`);
  }
});

test("a paused sandbox of a silent host stays paused", () => {
  assert.equal(nextStatus("paused", "hostLost"), undefined);
});

test("a pause and a resume that failed go back", () => {
  assert.equal(nextStatus("pausing", "seenRunning"), "running");
  assert.equal(nextStatus("resuming", "seenPaused"), "paused");
});
