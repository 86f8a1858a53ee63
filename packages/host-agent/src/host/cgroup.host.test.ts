import { strict as assert } from "node:assert";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync } from "node:fs";
import { afterEach, test } from "vitest";
import { listOwnedCgroups, makeCgroup, probeCgroups, removeCgroup } from "./cgroup.ts";
import type { Cgroup } from "./cgroup.ts";

const OWNER = `rookery-test-${process.pid}`;
afterEach(() => removeCgroup(OWNER));

/** A shell that has joined `group` before it runs `script`. */
function spawnIn(group: Cgroup, script: string) {
  const join = group.procs.map((file) => `echo $$ > ${file}`).join(" && ");
  return spawn("sh", ["-c", `${join} && echo joined && { ${script}; }`], {
    stdio: ["ignore", "pipe", "inherit"],
  });
}

test("this machine keeps every limit, or says which it does not", async () => {
  const probe = await probeCgroups();
  assert(probe.ok || probe.reason !== undefined);
  assert.deepEqual(await listOwnedCgroups("rookery-probe-"), []);
});

test("removing a group ends what runs in it and below it, and bears running twice", async () => {
  const groups = await Promise.all(
    ["vm1", "vm2"].map((name) => makeCgroup(`${OWNER}/${name}`, { memoryBytes: 64 << 20, pids: 16 })),
  );
  const children = groups.map((group) => spawnIn(group, "sleep 600 & sleep 600"));
  await Promise.all(children.map((child) => once(child.stdout, "data")));
  const ended = Promise.all(children.map((child) => once(child, "exit")));
  await removeCgroup(OWNER);
  assert.deepEqual(await ended, [
    [null, "SIGKILL"],
    [null, "SIGKILL"],
  ]);
  for (const file of groups.flatMap(({ procs }) => procs)) assert(!existsSync(file));
  await removeCgroup(OWNER);
  await groups[0]?.remove();
});

test("a group cannot hold more memory than it was given, and counts who was killed for it", async () => {
  const group = await makeCgroup(`${OWNER}/hog`, { memoryBytes: 32 << 20, pids: 16 });
  const hog = spawnIn(group, "exec node -e 'Buffer.alloc(256 << 20, 1)'");
  const [code, killedBy] = await once(hog, "exit");
  assert.deepEqual([code, killedBy], [null, "SIGKILL"]);
  assert.equal(await group.oomKills(), 1);
});

test("a fork bomb ends at the group's number of processes", async () => {
  const group = await makeCgroup(`${OWNER}/bomb`, { memoryBytes: 256 << 20, pids: 8 });
  const bomb = spawnIn(group, "i=0; while :; do sleep 600 & i=$((i + 1)); [ $i -gt 50 ] && exit 7; done");
  const [code] = await once(bomb, "exit");
  assert.notEqual(code, 7);
});

test("making a group again changes its limits, upwards and downwards", async () => {
  for (const [megabytes, cpuQuotaCores] of [
    [64, 1],
    [256, undefined],
    [32, 0.5],
  ] as const) {
    await makeCgroup(`${OWNER}/vm1`, {
      memoryBytes: megabytes << 20,
      pids: 16,
      cpuWeight: 50,
      cpuQuotaCores,
    });
  }
});

test("groups are found again by what their names begin with", async () => {
  await makeCgroup(`${OWNER}/a1`, { memoryBytes: 64 << 20, pids: 16 });
  await makeCgroup(`${OWNER}/a2`, { memoryBytes: 64 << 20, pids: 16 });
  await makeCgroup(`${OWNER}/b1`, { memoryBytes: 64 << 20, pids: 16 });
  assert.deepEqual(await listOwnedCgroups(`${OWNER}/`), [`${OWNER}/a1`, `${OWNER}/a2`, `${OWNER}/b1`]);
  assert.deepEqual(await listOwnedCgroups(`${OWNER}/a`), [`${OWNER}/a1`, `${OWNER}/a2`]);
  assert.deepEqual(await listOwnedCgroups(OWNER), [OWNER]);
  assert.deepEqual(await listOwnedCgroups(`${OWNER}-none/`), []);
});

test("a name that leaves its place is refused", async () => {
  await assert.rejects(makeCgroup("../x", { memoryBytes: 1 << 20, pids: 1 }), /not a cgroup name/);
  await assert.rejects(removeCgroup("a/../../x"), /not a cgroup name/);
});
