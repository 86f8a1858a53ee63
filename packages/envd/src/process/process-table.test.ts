import assert from "node:assert/strict";
import { test } from "vitest";
import { ENDED_RETENTION_MS, MAX_ENDED } from "../limits.ts";
import { describeExit } from "./exit-status.ts";
import { ProcessTable } from "./process-table.ts";
import type { RunningProcess } from "./running-process.ts";

const end = describeExit({ code: 0, signal: null });
// The table reads nothing else of a process.
const process = (pid: number, tag?: string) => ({ pid, facts: { tag } }) as RunningProcess;

test("an end is kept for its time, then forgotten without a timer", () => {
  let now = 0;
  const table = new ProcessTable(() => now);
  const first = process(1, "t");
  table.add(first);
  assert.equal(table.find({ case: "tag", value: "t" }), first);
  table.end(first, end);
  assert.equal(table.find({ case: "pid", value: 1 }), undefined);
  now = ENDED_RETENTION_MS;
  assert.equal(table.findEnded({ case: "tag", value: "t" })?.pid, 1);
  now += 1;
  assert.equal(table.findEnded({ case: "tag", value: "t" }), undefined);
});

test("of many ends the latest are kept", () => {
  const table = new ProcessTable(() => 0);
  for (let pid = 1; pid <= MAX_ENDED + 5; pid += 1) table.end(process(pid), end);
  assert.equal(table.findEnded({ case: "pid", value: 5 }), undefined);
  assert.equal(table.findEnded({ case: "pid", value: 6 })?.pid, 6);
});

test("a process number that is used again is the new process's", () => {
  const table = new ProcessTable(() => 0);
  table.end(process(7, "old"), end);
  const next = process(7, "new");
  table.add(next);
  assert.equal(table.findEnded({ case: "pid", value: 7 }), undefined);
  assert.equal(table.find({ case: "pid", value: 7 }), next);
});

test("exits are told in Go's words", () => {
  assert.deepEqual(describeExit({ code: 0, signal: null }), {
    exitCode: 0,
    exited: true,
    status: "exit status 0",
    error: undefined,
  });
  assert.equal(describeExit({ code: null, signal: "SIGKILL" }).status, "signal: killed");
  assert.equal(describeExit({ code: null, signal: "SIGXCPU" }).status, "signal: signal 24");
  assert.equal(describeExit({ code: null, signal: "SIGSEGV" }).exitCode, -1);
});
