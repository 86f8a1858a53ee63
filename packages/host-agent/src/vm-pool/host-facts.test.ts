import { strict as assert } from "node:assert";
import { spawn } from "node:child_process";
import type { ChildProcess } from "node:child_process";
import { once } from "node:events";
import { mkdir, mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, test } from "vitest";
import { openHostFacts } from "./host-facts.ts";

let dir: string;
const children: ChildProcess[] = [];

beforeEach(async () => {
  dir = await mkdtemp(join(tmpdir(), "rookery-facts-"));
});
afterEach(async () => {
  for (const child of children.splice(0)) {
    if (child.exitCode !== null || child.signalCode !== null) continue;
    child.kill("SIGKILL");
    await once(child, "exit");
  }
  await rm(dir, { recursive: true, force: true });
});

async function sleepIn(name: string): Promise<ChildProcess> {
  const cwd = join(dir, name);
  await mkdir(cwd, { recursive: true });
  const child = spawn("sleep", ["600"], { cwd, stdio: "ignore" });
  children.push(child);
  await once(child, "spawn");
  return child;
}

test("what a crash left of a VMM is found by its run directory, and nothing else ends", async () => {
  const facts = await openHostFacts();
  const left = await sleepIn("vm1/run");
  const others = [await sleepIn("vm10/run"), await sleepIn("vm1"), await sleepIn("vm1/run/below")];
  const ended = once(left, "exit");
  await facts.killProcessesIn(join(dir, "vm1/run"));
  assert.deepEqual(await ended, [null, "SIGKILL"]);
  for (const { exitCode, signalCode } of others) assert.equal(exitCode ?? signalCode, null);
  await facts.killProcessesIn(join(dir, "vm1/run"));
  await facts.killProcessesIn(join(dir, "never-made"));
});

test("the processes of root are not ended by their uid", async () => {
  const facts = await openHostFacts();
  await assert.rejects(facts.killProcessesOf(0), /refusing/);
});
