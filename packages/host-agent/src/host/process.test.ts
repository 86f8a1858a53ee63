import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { test } from "vitest";
import { identifyChild, identifyProcess, isAlive, signalProcess, waitUntilGone } from "./process.ts";

test("a process is told apart from another that bears its pid", async () => {
  const child = spawn("sleep", ["60"], { stdio: "ignore" });
  assert.ok(child.pid);
  const identity = identifyChild(child.pid);
  await once(child, "spawn");
  assert.deepEqual(await identifyProcess(child.pid), identity);
  assert.equal(await isAlive(identity), true);
  const another = { ...identity, startTime: "1" };
  assert.equal(await isAlive(another), false);
  assert.equal(await signalProcess(another, "SIGKILL"), false);
  assert.equal(await waitUntilGone(identity, { timeoutMs: 1 }), false);

  assert.equal(await signalProcess(identity, "SIGKILL"), true);
  assert.equal(await waitUntilGone(identity, { timeoutMs: 10_000 }), true);
  assert.equal(await signalProcess(identity, "SIGKILL"), false);
  assert.equal(await identifyProcess(child.pid), undefined);
});

test("a name with blanks and parentheses does not confuse the start time", async () => {
  const child = spawn("/bin/sh", ["-c", "printf 'a) b (c' > /proc/$$/comm; exec 3>&1; read -r line"], {
    stdio: ["pipe", "ignore", "ignore"],
  });
  assert.ok(child.pid);
  const identity = identifyChild(child.pid);
  assert.match(identity.startTime, /^\d+$/);
  assert.equal(await isAlive(identity), true);
  child.stdin.end();
  await once(child, "exit");
  assert.equal(await isAlive(identity), false);
});
