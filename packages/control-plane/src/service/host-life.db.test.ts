/** The rules of a host's life, and who wins when two go for it at once. */
import assert from "node:assert/strict";
import type { Queryable } from "../db/database.ts";
import { RookeryError } from "@rookery/protocol/errors";
import { jwtVerify } from "jose";
import { beforeEach, expect, test } from "vitest";
import { changeHost, deleteHost, revokeHost } from "../db/host-end.ts";
import { findSandbox, insertSandbox, moveSandbox } from "../db/sandboxes.ts";
import { teamQuota } from "../db/teams.ts";
import { lockWaiters } from "../db/testing/lock-waiters.ts";
import { DeadlineSweep } from "../hosts/deadline-sweep.ts";
import { HostMonitor } from "../hosts/host-monitor.ts";
import { retireClients } from "../hosts/retire-clients.ts";
import { holding } from "../hosts/testing/fake-agent.ts";
import type { HostId, SandboxId } from "../model/ids.ts";
import type { Caller } from "./services.ts";
import {
  DEFAULTS,
  LOAD,
  type TestHost,
  type TestPlane,
  factsOf,
  useTestPlane,
} from "./testing/test-plane.ts";

const openPlane = useTestPlane({ destroyMs: 3_000, cacheMs: 50 });
const forever = new AbortController().signal;
let plane: TestPlane;
let operator: Caller;
let caller: Caller;
let host: TestHost;

beforeEach(async () => {
  plane = await openPlane();
  // Tests of a file share its database: hosts of those before take nothing.
  await plane.deps.db.updateTable("hosts").set({ draining: true }).execute();
  operator = await plane.newCaller("platform");
  caller = await plane.newCaller();
  host = await plane.newHost();
});

const create = async (): Promise<SandboxId> => (await plane.services.createSandbox(caller, DEFAULTS)).id;
const rowOf = async (id: SandboxId) => {
  const row = await findSandbox(plane.deps.db, caller.teamId, id);
  assert.ok(row);
  return row;
};
const beat = (who = host) =>
  plane.services.heartbeat(who.accessToken, who.id, {
    load: LOAD,
    digest: "d",
    eventLogId: who.agent.logId,
    lastEventNumber: 0n,
  });
const insertOn = (db: Queryable, hostId: HostId) =>
  insertSandbox(
    db,
    {
      ...{ id: plane.deps.ids.sandbox(), teamId: caller.teamId, hostId, template: "base" },
      ...{ vcpus: 1, memoryMb: 512, diskMb: 4096, timeoutSec: 0, env: {}, metadata: {} },
      ...{ onTimeout: "pause", timeoutMode: "idle", deadlineMs: 30_000 },
    },
    { defaultQuota: 1_000 },
  );
const somebodyWaits = () =>
  expect.poll(() => lockWaiters(plane.deps.db), { timeout: 20_000 }).toBeGreaterThan(0);

test("a host is renamed and relabelled by its team and by a platform key, and is not there for others", async () => {
  const owner = await plane.newCaller();
  const { host: own } = await plane.services.createHost(owner, {
    name: "a",
    type: "byoc",
    labels: { zone: "1" },
  });
  assert.deepEqual((await plane.services.updateHost(owner, own.id, { name: "b" })).labels, { zone: "1" });
  const changed = await plane.services.updateHost(operator, own.id, { labels: { rack: "2" } });
  assert.deepEqual([changed.name, changed.labels], ["b", { rack: "2" }]);
  assert.equal((await plane.services.updateHost(owner, own.id, {})).name, "b");
  for (const [who, id] of [
    [caller, own.id],
    [caller, host.id],
    [operator, plane.deps.ids.host()],
  ] as const) {
    const { services } = plane;
    for (const attempt of [
      () => services.updateHost(who, id, { name: "x" }),
      () => services.setHostDraining(who, id, true),
      () => services.revokeHost(who, id),
      () => services.previewHostDeletion(who, id),
      () => services.deleteHost(who, id, { force: true }),
    ]) {
      await assert.rejects(attempt, { code: "not_found" });
    }
  }
  assert.equal((await plane.services.getHost(operator, host.id)).status, "online");
  assert.equal((await plane.services.getHost(operator, own.id)).name, "b");
});

test("a draining host takes no new sandboxes, keeps what it has, and takes some again", async () => {
  const id = await create();
  await plane.services.pauseSandbox(caller, id);
  assert.equal((await plane.services.setHostDraining(operator, host.id, true)).status, "draining");
  await assert.rejects(create(), { code: "no_capacity" });
  assert.equal((await plane.services.resumeSandbox(caller, id)).status, "running");
  await beat();
  assert.equal((await plane.services.getHost(operator, host.id)).status, "draining");
  assert.equal((await plane.services.setHostDraining(operator, host.id, false)).status, "online");
  await create();
});

test("a create that races with a drain comes wholly before it, or not at all", async () => {
  const { db } = plane.deps;
  let late: ReturnType<typeof insertOn> | undefined;
  await db.transaction().execute(async (tx) => {
    await changeHost(tx, "all", host.id, { draining: true });
    late = insertOn(db, host.id);
    await somebodyWaits();
  });
  assert.equal(await late, undefined);
  assert.equal((await teamQuota(db, caller.teamId))?.live, 0);
});

test("a create whose next host begins to drain meanwhile ends, and so does its row", async () => {
  const second = await plane.newHost();
  const [refuser, drainer] = host.id < second.id ? [host, second] : [second, host];
  refuser.agent.before = async ({ method }) => {
    if (method !== "createSandbox") return;
    await plane.services.setHostDraining(operator, drainer.id, true);
    throw new RookeryError("no_capacity", "the test says so");
  };
  await assert.rejects(create(), { code: "no_capacity" });
  const { items } = await plane.services.listSandboxes(caller, {
    ...{ statuses: ["error"], metadata: {}, limit: 10 },
  });
  assert.deepEqual(
    items.map(({ status, error }) => [status, error?.code]),
    [["error", "no_capacity"]],
  );
});

test("a row is not placed on a host that is deleted, nor on one that drains", async () => {
  const row = await insertOn(plane.deps.db, host.id);
  assert.ok(row);
  const refused = await moveSandbox(plane.deps.db, row, "refused", { hostId: null, deadlineMs: 1_000 });
  assert.ok(refused);
  const second = await plane.newHost();
  await plane.services.deleteHost(operator, second.id, { force: false });
  const assign = (hostId: HostId) =>
    moveSandbox(plane.deps.db, refused, "assign", { hostId, deadlineMs: 1_000 });
  assert.equal(await assign(second.id), undefined);
  await plane.services.setHostDraining(operator, host.id, true);
  assert.equal(await assign(host.id), undefined);
  await plane.services.setHostDraining(operator, host.id, false);
  assert.equal((await assign(host.id))?.status, "starting");
});

test("a host with sandboxes is not deleted, and the refusal names them; without them it is", async () => {
  const id = await create();
  await assert.rejects(plane.services.deleteHost(operator, host.id, { force: false }), {
    code: "host_has_sandboxes",
    details: {
      sandboxes: [{ id, team_id: caller.teamId, status: "running" }],
      sandbox_count: 1,
      snapshots: [],
      snapshot_count: 0,
    },
  });
  assert.equal((await plane.services.getSandbox(caller, id)).status, "running");
  await plane.services.destroySandbox(caller, id);
  await plane.services.deleteHost(operator, host.id, { force: false });
  await assert.rejects(plane.services.getHost(operator, host.id), { code: "not_found" });
  await assert.rejects(plane.services.deleteHost(operator, host.id, { force: false }), { code: "not_found" });
  const { items } = await plane.services.listHosts(operator, { limit: 200 });
  assert.ok(!items.some((item) => item.id === host.id));
  assert.equal((await rowOf(id)).hostId, host.id, "history names the host");
});

test("a refusal lists at most a hundred of very many, and says how many there are", async () => {
  for (let i = 0; i < 103; i++) assert.ok(await insertOn(plane.deps.db, host.id));
  const preview = await plane.services.previewHostDeletion(operator, host.id);
  assert.deepEqual([preview.sandboxes.length, preview.sandboxCount], [100, 103]);
  await plane.services.deleteHost(operator, host.id, { force: true });
  assert.equal((await teamQuota(plane.deps.db, caller.teamId))?.live, 0);
});

test("a forced deletion ends all that is there: on the host, in the rows, in the teams' counts", async () => {
  const other = await plane.newCaller();
  const running = await create();
  const paused = await create();
  await plane.services.pauseSandbox(caller, paused);
  const theirs = (await plane.services.createSandbox(other, DEFAULTS)).id;
  await plane.services.deleteHost(operator, host.id, { force: true });
  for (const id of [running, paused]) {
    const { status, error, endedAt } = await rowOf(id);
    assert.deepEqual([status, error?.code, endedAt instanceof Date], ["stopped", "host_error", true]);
  }
  assert.equal((await plane.services.getSandbox(other, theirs)).status, "stopped");
  for (const team of [caller, other]) assert.equal((await teamQuota(plane.deps.db, team.teamId))?.live, 0);
  assert.equal(host.agent.sandboxes.size, 0);
  await assert.rejects(plane.services.pauseSandbox(caller, running), { code: "wrong_state" });
  assert.ok(!plane.deps.pool.epochs.has(host.id), "its client is gone");
});

test("a deleted host is refused by name of the reason, whatever it shows, and by no other's token", async () => {
  const { services } = plane;
  const second = await plane.newHost();
  await assert.rejects(services.heartbeat(second.accessToken, host.id, { ...heartbeatOf(second) }), {
    code: "forbidden",
  });
  await services.deleteHost(operator, host.id, { force: true });
  for (const call of [() => beat(), () => services.refreshHostTokens(host.refreshToken)]) {
    const refusal: unknown = await call().catch((cause: unknown) => cause);
    assert.ok(refusal instanceof RookeryError);
    assert.equal(refusal.code, "invalid_token");
    assert.equal(refusal.details?.["reason"], "host_deleted");
    // What its agent demands before it destroys anything: host-agent/src/rpc/auth.ts.
    const { payload } = await jwtVerify(String(refusal.details["proof"]), plane.deps.cluster.verifyingKey);
    const { purpose, aud, iss } = payload;
    assert.deepEqual([purpose, aud, iss], ["end-host", host.id, "rookery-control-plane"]);
  }
  await assert.rejects(services.newRegistrationToken(operator, host.id), { code: "not_found" });
  await beat(second);
});

const heartbeatOf = ({ agent }: TestHost) => ({
  ...{ load: LOAD, digest: "d", eventLogId: agent.logId, lastEventNumber: 0n },
});

test("a silent host is deleted without waiting for it, and its work under way ends too", async () => {
  const running = await create();
  const starting = await insertOn(plane.deps.db, host.id);
  assert.ok(starting);
  const stopping = await create();
  assert.ok(await moveSandbox(plane.deps.db, await rowOf(stopping), "destroy", { deadlineMs: 1_000 }));
  await plane.deps.db.updateTable("hosts").set({ status: "unreachable" }).where("id", "=", host.id).execute();
  host.agent.calls.length = 0;
  await plane.services.deleteHost(operator, host.id, { force: true });
  for (const id of [running, starting.id, stopping]) assert.equal((await rowOf(id)).status, "stopped");
  assert.deepEqual(host.agent.calls, []);
});

test("a host that hangs holds its deletion up by the limit at most, and its rows are final all the same", async () => {
  const id = await create();
  const held = holding("endHost");
  host.agent.before = held.hook;
  await plane.services.deleteHost(operator, host.id, { force: true });
  held.release();
  assert.equal((await rowOf(id)).status, "stopped");
});

test("a host that never registered is deleted, and its token with it", async () => {
  const { host: pending, registrationToken } = await plane.services.createHost(operator, {
    ...{ name: "p", type: "shared", labels: {} },
  });
  await plane.services.deleteHost(operator, pending.id, { force: false });
  await assert.rejects(plane.services.registerHost(factsOf(host.agent, registrationToken)), {
    code: "invalid_token",
  });
});

test("snapshots that are on no other host keep it from going, are shown, and go with it by force", async () => {
  const id = await create();
  const snapshot = await plane.services.createSnapshot(caller, {
    sandboxId: id,
    name: "only",
    overwrite: false,
  });
  await plane.services.destroySandbox(caller, id);
  await assert.rejects(plane.services.deleteHost(operator, host.id, { force: false }), {
    code: "host_has_sandboxes",
    message: /1 snapshots/,
  });
  const preview = await plane.services.previewHostDeletion(operator, host.id);
  assert.deepEqual(
    [preview.sandboxCount, preview.snapshotCount, preview.snapshots[0]],
    [0, 1, { id: snapshot.id, teamId: caller.teamId, name: "only", sizeBytes: 5_000_000_000 }],
  );
  await plane.services.deleteHost(operator, host.id, { force: true });
  assert.deepEqual((await plane.services.listSnapshots(caller, { limit: 10 })).items, []);
});

test("a snapshot that is being made when its host is deleted is an error, and leaves no row", async () => {
  const id = await create();
  const held = holding("createSnapshot");
  host.agent.before = held.hook;
  const making = plane.services.createSnapshot(caller, { sandboxId: id, name: "late", overwrite: false });
  const failed = assert.rejects(making);
  await held.arrived;
  await plane.services.deleteHost(operator, host.id, { force: true });
  held.release();
  await failed;
  await new DeadlineSweep(plane.deps, { batch: 50, leaseMs: 1_000, againMs: 0, silentAgainMs: 0 }).round();
  const rows = await plane.deps.db
    .selectFrom("snapshots")
    .select("id")
    .where("host_id", "=", host.id)
    .execute();
  assert.deepEqual(rows, []);
});

test("a revoked host is cut off at once, and comes back by a new token to what it has", async () => {
  const id = await create();
  const { services } = plane;
  const { registrationToken: unused } = await services
    .newRegistrationToken(operator, host.id)
    .catch(() => ({ registrationToken: "" }));
  assert.equal(unused, "", "one at work gets none");
  const revoked = await services.revokeHost(operator, host.id);
  assert.deepEqual([revoked.status, revoked.revokedAt instanceof Date], ["unreachable", true]);
  const refused = { code: "invalid_token", details: { reason: "host_revoked" } };
  await assert.rejects(beat(), refused);
  await assert.rejects(services.refreshHostTokens(host.refreshToken), refused);
  assert.equal((await rowOf(id)).status, "missing");
  await assert.rejects(services.pauseSandbox(caller, id), { code: "wrong_state" });
  assert.ok(!plane.deps.pool.epochs.has(host.id));

  const { registrationToken } = await services.newRegistrationToken(operator, host.id);
  await services.revokeHost(operator, host.id);
  await assert.rejects(services.registerHost(factsOf(host.agent, registrationToken)), {
    code: "invalid_token",
  });
  const again = await services.newRegistrationToken(operator, host.id);
  const { accessToken } = await services.registerHost(factsOf(host.agent, again.registrationToken));
  await beat({ ...host, accessToken });
  await assert.rejects(beat(), { code: "invalid_token" });
  await assert.rejects(services.refreshHostTokens(host.refreshToken), { code: "invalid_token" });
  const back = await services.getHost(operator, host.id);
  assert.deepEqual([back.status, back.revokedAt], ["online", undefined]);
  await new HostMonitor(plane.deps, {
    everyMs: 0,
    silentMs: 90_000,
    limitMs: 5_000,
    batch: 500,
    compareEveryMs: 600_000,
  }).round(forever);
  assert.equal((await rowOf(id)).status, "running");
});

test("what one replica revokes or deletes, another has no client for any more", async () => {
  const replica = await openPlane();
  const id = await create();
  const second = await plane.newHost();
  await replica.services.pingSandbox(caller, id);
  const endpoint = { id: second.id, address: second.agent.address, epoch: 1 };
  await replica.deps.pool.agent(endpoint).listSandboxes({ after: "", limit: 1 });
  await retireClients(replica.deps);
  assert.ok(replica.deps.pool.epochs.has(host.id) && replica.deps.pool.epochs.has(second.id));
  await plane.services.revokeHost(operator, host.id);
  await plane.services.deleteHost(operator, second.id, { force: true });
  await retireClients(replica.deps);
  assert.equal(replica.deps.pool.epochs.size, 0);
  assert.throws(() => replica.deps.pool.agent(endpoint), { code: "host_unreachable" });
});

test("of two replicas that delete a host, one does", async () => {
  const replica = await openPlane();
  const id = await create();
  const results = await Promise.allSettled(
    [plane, replica].map(({ services }) => services.deleteHost(operator, host.id, { force: true })),
  );
  assert.deepEqual(results.map(({ status }) => status).toSorted(), ["fulfilled", "rejected"]);
  assert.equal((await rowOf(id)).status, "stopped");
  assert.equal((await teamQuota(plane.deps.db, caller.teamId))?.live, 0);
});

test("a create that races with a deletion is stopped by it, or finds the host gone", async () => {
  const { db } = plane.deps;
  let deleting: ReturnType<typeof deleteHost> | undefined;
  const placed = await db.transaction().execute(async (tx) => {
    const row = await insertOn(tx, host.id);
    deleting = deleteHost(db, "all", host.id, { force: true, limit: 1 });
    await somebodyWaits();
    return row;
  });
  assert.ok(placed);
  const deletion = await deleting;
  assert.ok(deletion?.kind === "deleted");
  assert.deepEqual(deletion.stopped, [{ id: placed.id, generation: 2n }]);

  const second = await plane.newHost();
  let late: ReturnType<typeof insertOn> | undefined;
  await db.transaction().execute(async (tx) => {
    await tx.selectFrom("hosts").select("id").where("id", "=", second.id).forUpdate().execute();
    late = insertOn(db, second.id);
    await somebodyWaits();
    await tx.updateTable("hosts").set({ deleted_at: new Date() }).where("id", "=", second.id).execute();
  });
  assert.equal(await late, undefined);
});

test("whatever two replicas are at when a host is deleted, no live row is on it afterwards", async () => {
  const replica = await openPlane();
  const spare = await plane.newHost();
  const ids = await Promise.all(Array.from({ length: 6 }, create));
  await Promise.all(ids.slice(3).map((id) => plane.services.pauseSandbox(caller, id)));
  const work = [plane, replica].flatMap(({ services }) => [
    ...Array.from({ length: 8 }, () => services.createSandbox(caller, DEFAULTS)),
    ...ids.slice(0, 3).map((id) => services.pauseSandbox(caller, id)),
    ...ids.slice(3).map((id) => services.resumeSandbox(caller, id)),
    ...ids.slice(0, 2).map((id) => services.destroySandbox(caller, id)),
  ]);
  const deletion = replica.services.deleteHost(operator, host.id, { force: true });
  const [, results] = await Promise.all([deletion, Promise.allSettled(work)]);
  const reasons = results.flatMap((result) => (result.status === "rejected" ? [codeOf(result.reason)] : []));
  for (const code of reasons) assert.match(code, /^(wrong_state|host_unreachable|no_capacity)$/);
  const { items } = await plane.services.listSandboxes(caller, { statuses: [], metadata: {}, limit: 200 });
  assert.deepEqual([...new Set(items.map(({ hostId }) => hostId))], [spare.id]);
  assert.equal((await teamQuota(plane.deps.db, caller.teamId))?.live, items.length);
  assert.equal(await revokeHost(plane.deps.db, "all", host.id), undefined);
});

function codeOf(cause: unknown): string {
  return cause instanceof Error && "code" in cause ? String(cause.code) : String(cause);
}
