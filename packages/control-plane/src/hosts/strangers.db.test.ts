import assert from "node:assert/strict";
import { beforeEach, test } from "vitest";
import { countStrangers } from "../db/host-strangers.ts";
import { findHost } from "../db/hosts.ts";
import { findSandbox } from "../db/sandboxes.ts";
import type { SandboxId } from "../model/ids.ts";
import type { Caller } from "../service/services.ts";
import { DEFAULTS, type TestHost, type TestPlane, useTestPlane } from "../service/testing/test-plane.ts";
import { HostMonitor } from "./host-monitor.ts";
import { failing } from "./testing/fake-agent.ts";

const DAY_MS = 24 * 3_600_000;
const openPlane = useTestPlane();
const forever = new AbortController().signal;
let plane: TestPlane;
let host: TestHost;
let caller: Caller;

beforeEach(async () => {
  plane = await openPlane();
  // One host and nothing else to do: tests of a file share its database.
  await plane.deps.db
    .updateTable("hosts")
    .set({ draining: true, next_check_at: new Date("2100-01-01"), strangers: 0, strangers_untouched: false })
    .execute();
  host = await plane.newHost();
  caller = await plane.newCaller();
});

/** Each by another replica: none has what one before it knew. */
const round = async (options: { strangerKeepMs?: number } = {}): Promise<void> => {
  await plane.deps.db
    .updateTable("hosts")
    .set({ next_check_at: new Date(0), digest_differs: true })
    .where("id", "=", host.id)
    .execute();
  const monitor = { everyMs: 0, silentMs: 90_000, limitMs: 30_000, batch: 50, compareEveryMs: 600_000 };
  await new HostMonitor(plane.deps, { ...monitor, ...options }).round(forever);
};
const create = async (): Promise<SandboxId> => (await plane.services.createSandbox(caller, DEFAULTS)).id;
const rowOf = async (id: SandboxId) => findSandbox(plane.deps.db, caller.teamId, id);
const hostRow = async () => findHost(plane.deps.db, "all", host.id);
const fakeOf = (id: string) => host.agent.sandboxes.get(id);
/** As when an older backup is put back: the row is gone, and may be put back too. */
const forget = async (...ids: SandboxId[]): Promise<() => Promise<void>> => {
  const rows = await plane.deps.db.deleteFrom("sandboxes").where("id", "in", ids).returningAll().execute();
  return async () => {
    for (const row of rows) {
      const { env, metadata } = row;
      const values = { ...row, env: JSON.stringify(env), metadata: JSON.stringify(metadata) };
      await plane.deps.db.insertInto("sandboxes").values(values).execute();
    }
  };
};
const age = (id: string, ms: number): void => {
  const { stranger } = fakeOf(id) ?? assert.fail("it is gone");
  assert.ok(stranger);
  stranger.sinceMs -= ms;
};
const errors = () => plane.log.filter(({ level }) => level === "error").map(({ words }) => words);

test("a sandbox that no row knows is stopped, reported loudly, kept for a day, and then destroyed", async () => {
  const known = await create();
  const stranger = await create();
  await forget(stranger);
  await round();
  assert.equal(fakeOf(stranger)?.phase, "PAUSED");
  assert.equal(fakeOf(known)?.phase, "RUNNING");
  assert.equal((await hostRow())?.strangers, 1);
  const report = plane.log.find(({ level }) => level === "error");
  assert.deepEqual([report?.facts["sandboxes"], report?.facts["total"]], [[stranger], 2]);
  assert.deepEqual(await countStrangers(plane.deps.db), { sandboxes: 1, hosts: 1, untouchedHosts: 0 });

  age(stranger, DAY_MS - 60_000);
  await round();
  assert.ok(fakeOf(stranger), "its day is not over");
  assert.equal(host.agent.callsOf("freezeSandbox").length, 1, "since when, its host knows");
  age(stranger, 120_000);
  await round();
  assert.equal(fakeOf(stranger), undefined);
  assert.ok(fakeOf(known));
  await round();
  assert.equal((await hostRow())?.strangers, 0);
});

test("how long strangers are kept is a setting", async () => {
  const stranger = await create();
  await forget(stranger);
  await round({ strangerKeepMs: 60_000 });
  age(stranger, 61_000);
  await round({ strangerKeepMs: 60_000 });
  assert.equal(fakeOf(stranger), undefined);
});

test("when the row comes back, the sandbox goes on", async () => {
  const [running, paused] = [await create(), await create()];
  await plane.services.pauseSandbox(caller, paused);
  const putBack = await forget(running, paused);
  await round();
  assert.deepEqual([fakeOf(running)?.phase, fakeOf(paused)?.phase], ["PAUSED", "PAUSED"]);
  await putBack();
  await round();
  assert.deepEqual([fakeOf(running)?.phase, fakeOf(paused)?.phase], ["RUNNING", "PAUSED"]);
  assert.deepEqual([(await rowOf(running))?.status, (await rowOf(paused))?.status], ["running", "paused"]);
  assert.deepEqual([fakeOf(running)?.stranger, fakeOf(paused)?.stranger], [undefined, undefined]);
  assert.equal((await hostRow())?.strangers, 0);
});

test("one that can't be thawed yet keeps its row as it is", async () => {
  const id = await create();
  const putBack = await forget(id);
  await round();
  await putBack();
  host.agent.before = failing("thawSandbox", "host_error");
  await round();
  assert.equal((await rowOf(id))?.status, "running");
  host.agent.before = () => undefined;
  await round();
  assert.equal(fakeOf(id)?.phase, "RUNNING");
});

test("a control plane whose database lost its rows touches nothing, however long that lasts", async () => {
  const ids = [];
  for (let i = 0; i < 8; i++) ids.push(await create());
  const putBack = await forget(...ids);
  host.agent.calls.length = 0;
  for (let i = 0; i < 3; i++) await round({ strangerKeepMs: 1 });
  assert.deepEqual(new Set(host.agent.calls.map(({ method }) => method)), new Set(["listSandboxes"]));
  assert.ok(errors().every((words) => /nothing is touched. Is this the right database/.test(words)));
  assert.deepEqual([(await hostRow())?.strangers, (await hostRow())?.strangersUntouched], [8, true]);
  assert.equal((await countStrangers(plane.deps.db)).untouchedHosts, 1);
  await putBack();
  await round();
  for (const id of ids) assert.equal((await rowOf(id))?.status, "running");
  assert.deepEqual((await hostRow())?.strangersUntouched, false);
});

test("neither five of few nor six of many are that unlikely", async () => {
  const few = [];
  for (let i = 0; i < 5; i++) few.push(await create());
  await forget(...few);
  await round();
  for (const id of few) assert.equal(fakeOf(id)?.phase, "PAUSED");
  // With these there are 6 strangers of 30.
  for (let i = 0; i < 24; i++) await create();
  const sixth = await create();
  await forget(sixth);
  await round();
  assert.equal(fakeOf(sixth)?.phase, "PAUSED");
  assert.equal((await hostRow())?.strangersUntouched, false);
  // And one more makes 7 of 31, which is more than a fifth.
  const seventh = await create();
  await forget(seventh);
  await round({ strangerKeepMs: 1 });
  assert.equal(fakeOf(seventh)?.phase, "RUNNING");
  assert.ok(fakeOf(few[0]!), "not even those whose time is over are touched");
  assert.equal((await hostRow())?.strangersUntouched, true);
});

test("a stranger that is being worked on, or that its host can't stop, waits for the next round", async () => {
  const [first, second] = [await create(), await create()];
  await forget(first, second);
  fakeOf(first)!.phase = "PAUSING";
  host.agent.before = failing("freezeSandbox", "host_error");
  await round();
  host.agent.before = () => undefined;
  fakeOf(first)!.phase = "RUNNING";
  await round();
  for (const id of [first, second]) assert.equal(fakeOf(id)?.phase, "PAUSED");
});
