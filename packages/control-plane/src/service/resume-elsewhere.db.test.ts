/** Paused sandboxes of draining hosts that share an object store with others. */
import assert from "node:assert/strict";
import { RookeryError } from "@rookery/protocol/errors";
import { beforeEach, test } from "vitest";
import { findSandbox } from "../db/sandboxes.ts";
import { DeadlineSweep } from "../hosts/deadline-sweep.ts";
import { HostMonitor } from "../hosts/host-monitor.ts";
import { failing, holding } from "../hosts/testing/fake-agent.ts";
import type { HostId, SandboxId } from "../model/ids.ts";
import type { Caller } from "./services.ts";
import { DEFAULTS, LOAD, type TestHost, type TestPlane, useTestPlane } from "./testing/test-plane.ts";

const COMPAT = `${"c".repeat(64)}-tsc2096023`;
const openPlane = useTestPlane({ leaseMs: 5_000 });
const forever = new AbortController().signal;
let plane: TestPlane;
let caller: Caller;
/** Of this test alone: tests of a file share its database. */
let store: string;
/** The one that drains, and two that share its store. */
let home: TestHost;
let near: TestHost;
let far: TestHost;
let id: SandboxId;

beforeEach(async () => {
  plane = await openPlane();
  await plane.deps.db
    .updateTable("hosts")
    .set({ draining: true, next_check_at: new Date("2100-01-01") })
    .execute();
  await plane.deps.db
    .updateTable("cluster")
    .set({ receptive_since: new Date(0), receptive_at: new Date() })
    .execute();
  caller = await plane.newCaller();
  store = caller.teamId;
  home = await newHost();
  ({ id } = await plane.services.createSandbox(caller, { ...DEFAULTS, env: { A: "1" } }));
  await plane.services.pauseSandbox(caller, id);
  near = await newHost();
  far = await newHost();
  await change(far, { draining: true });
  await change(home, { draining: true });
});

/** What it makes is in the store at once. */
async function newHost(): Promise<TestHost> {
  const host = await plane.newHost();
  const { agent } = host;
  agent.compat = COMPAT;
  agent.after = storing(host);
  await plane.services.heartbeat(host.accessToken, host.id, {
    ...{ load: LOAD, digest: "d", eventLogId: agent.logId, lastEventNumber: 0n },
    snapshots: { compat: COMPAT, storeId: store },
  });
  return host;
}

const storing =
  ({ agent }: TestHost) =>
  () => {
    for (const snapshot of agent.snapshots) agent.stored.set(snapshot, store);
  };
const change = (host: TestHost, set: { draining?: boolean; status?: "online" | "unreachable" }) =>
  plane.deps.db.updateTable("hosts").set(set).where("id", "=", host.id).execute();
const resume = () => plane.services.resumeSandbox(caller, id);
const phaseOn = ({ agent }: TestHost) => agent.sandboxes.get(id)?.phase;
async function rowOf() {
  const row = await findSandbox(plane.deps.db, caller.teamId, id);
  assert.ok(row);
  return row;
}

async function look(host: TestHost): Promise<void> {
  await plane.deps.db
    .updateTable("hosts")
    .set({ next_check_at: new Date(0) })
    .where("id", "=", host.id)
    .execute();
  const monitor = new HostMonitor(plane.deps, {
    ...{ everyMs: 3_600_000, compareEveryMs: 0, silentMs: 90_000, limitMs: 10_000, batch: 50 },
  });
  await monitor.round(forever);
}

/** Whoever was at it is dead for longer than its lease. */
async function sweep(): Promise<void> {
  await plane.deps.db
    .updateTable("sandboxes")
    .set({ operation_deadline: new Date(0) })
    .where("id", "=", id)
    .where("operation_deadline", "is not", null)
    .execute();
  const options = { batch: 50, leaseMs: 5_000, againMs: 1_000, silentAgainMs: 1_000 };
  await new DeadlineSweep(plane.deps, options).round();
}

async function assertOnlyOn(host: TestHost, phase: "RUNNING" | "PAUSED"): Promise<void> {
  for (const each of [home, near, far]) await look(each);
  for (const each of [home, near, far]) assert.equal(phaseOn(each), each === host ? phase : undefined);
  const { status, hostId, movingFrom } = await rowOf();
  assert.deepEqual(
    { status, hostId, movingFrom },
    moved(phase === "RUNNING" ? "running" : "paused", host.id),
  );
  // What a host that did not answer was not told yet.
  const overdue = plane.deps.db.updateTable("snapshots").set({ operation_deadline: new Date(0) });
  await overdue.where("team_id", "=", caller.teamId).execute();
  await sweep();
  const left = plane.deps.db.selectFrom("snapshots").select("id").where("team_id", "=", caller.teamId);
  assert.deepEqual(await left.execute(), []);
  for (const { agent } of [home, near, far]) assert.equal(agent.snapshots.size, 0);
}

const moved = (status: string, hostId: HostId) => ({ status, hostId, movingFrom: undefined });

test("a paused sandbox of a draining host is resumed on another one, as the same sandbox", async () => {
  const token = home.agent.sandboxes.get(id)?.envdAccessToken;
  const row = await resume();
  assert.equal(row.hostId, near.id);
  assert.equal(phaseOn(home), undefined);
  const made = near.agent.sandboxes.get(id);
  assert.equal(made?.envdAccessToken, token);
  assert.match(String(made?.source), /^snap/);
  const { items } = await plane.services.listSandboxEvents(caller, id, { limit: 1 });
  const [last] = items;
  assert.deepEqual(
    { status: last?.status, reason: last?.reason, hostId: last?.hostId },
    { status: "running", reason: "moved", hostId: near.id },
  );
  await assertOnlyOn(near, "RUNNING");
  const { items: snapshots } = await plane.services.listSnapshots(caller, { limit: 10 });
  assert.deepEqual(snapshots, []);
});

test("there and back: the former host has forgotten it, and takes it again", async () => {
  await resume();
  await plane.services.pauseSandbox(caller, id);
  await change(home, { draining: false });
  await change(near, { draining: true });
  assert.equal((await resume()).hostId, home.id);
  await assertOnlyOn(home, "RUNNING");
});

test("it stays where nobody else can have it", async () => {
  await change(near, { draining: true });
  assert.equal((await resume()).hostId, home.id);
  assert.equal(home.agent.callsOf("createSnapshot").length, 0);
  await assertOnlyOn(home, "RUNNING");
});

test("it stays where its host can't send it", async () => {
  home.agent.before = failing("createSnapshot", "out_of_disk");
  assert.equal((await resume()).hostId, home.id);
  await assertOnlyOn(home, "RUNNING");
});

test("a host that does not drain keeps what it has", async () => {
  await change(home, { draining: false });
  assert.equal((await resume()).hostId, home.id);
  await assertOnlyOn(home, "RUNNING");
});

test("a host that refuses it is passed over", async () => {
  await change(far, { draining: false });
  for (const { agent } of [near]) agent.before = failing("createSandbox", "no_capacity");
  assert.equal((await resume()).hostId, far.id);
  await assertOnlyOn(far, "RUNNING");
});

test("when all others refuse it, it is resumed where it was", async () => {
  near.agent.before = failing("createSandbox", "guest_error");
  assert.equal((await resume()).hostId, home.id);
  assert.equal(near.agent.callsOf("createSandbox").length, 1);
  await assertOnlyOn(home, "RUNNING");
});

test("an answer that got lost: the other host ends what it may have made before it is resumed where it was", async () => {
  const { after } = near.agent;
  near.agent.after = (call) => {
    if (call.method === "createSandbox") near.agent.hangUp();
    return after(call);
  };
  assert.equal((await resume()).hostId, home.id);
  await assertOnlyOn(home, "RUNNING");
});

test("a host that falls silent in the middle: nobody runs it until that host has said what became of it", async () => {
  near.agent.after = async (call) => {
    if (call.method === "createSandbox") await near.agent.close();
  };
  await assert.rejects(resume(), { code: "host_unreachable" });
  assert.equal(phaseOn(near), "RUNNING");
  assert.equal(phaseOn(home), "PAUSED");
  for (const each of [home, far]) await look(each);
  assert.equal(phaseOn(home), "PAUSED", "its copy is kept");
  await change(near, { status: "unreachable" });
  await sweep();
  assert.equal((await rowOf()).status, "missing");
  await look(home);
  assert.equal(phaseOn(home), "PAUSED", "its copy is kept");
  await near.agent.listen();
  await change(near, { status: "online" });
  await look(near);
  await assertOnlyOn(near, "RUNNING");
});

test("the same, and it was never made there: it is paused where it was, and can be resumed", async () => {
  const { hook, arrived, release } = holding("createSandbox");
  near.agent.before = hook;
  const resuming = assert.rejects(resume(), RookeryError);
  await arrived;
  await near.agent.close();
  await resuming;
  near.agent.sandboxes.delete(id);
  await near.agent.listen();
  await sweep();
  assert.equal((await rowOf()).status, "paused");
  // The command comes through after all.
  release();
  await assertOnlyOn(home, "PAUSED");
  near.agent.before = () => undefined;
  assert.equal((await resume()).hostId, near.id);
  await assertOnlyOn(near, "RUNNING");
});

test("a replica that dies while another host is at it: the sweep finds it running, and its copy goes", async () => {
  const row = await rowOf();
  await halfway("RUNNING");
  await sweep();
  assert.equal((await rowOf()).generation > row.generation, true);
  await assertOnlyOn(near, "RUNNING");
});

test("a replica that dies before another host was told: it is paused where it was", async () => {
  await halfway(undefined);
  await sweep();
  assert.deepEqual(near.agent.callsOf("destroySandbox").length, 1, "a late command would be refused");
  await assertOnlyOn(home, "PAUSED");
});

test("a guest that ended on the other host before anybody saw it run: its copy is what there is", async () => {
  await halfway("FAILED");
  await sweep();
  await assertOnlyOn(home, "PAUSED");
});

test("destroyed in the middle, it ends on both", async () => {
  await halfway("RUNNING");
  await plane.services.destroySandbox(caller, id);
  assert.equal(phaseOn(home), undefined);
  assert.equal(phaseOn(near), undefined);
  assert.equal((await rowOf()).status, "stopped");
});

test("a host that is deleted while it is told to bring it up: it is paused where it was", async () => {
  await halfway(undefined);
  const platform = await plane.newCaller("platform");
  await plane.services.deleteHost(platform, near.id, { force: true });
  const { status, hostId, movingFrom } = await rowOf();
  assert.deepEqual({ status, hostId, movingFrom }, moved("paused", home.id));
  assert.equal((await resume()).hostId, home.id);
});

test("a host is not empty while it keeps what another one is told to bring up", async () => {
  await halfway("RUNNING");
  const platform = await plane.newCaller("platform");
  await assert.rejects(plane.services.deleteHost(platform, home.id, { force: false }), {
    code: "host_has_sandboxes",
  });
  await plane.services.deleteHost(platform, home.id, { force: true });
  await sweep();
  const { status, hostId, movingFrom } = await rowOf();
  assert.deepEqual({ status, hostId, movingFrom }, moved("running", near.id));
});

/** As a replica leaves it that died after it gave the row to `near`, where this is what came of it. */
async function halfway(there: "RUNNING" | "FAILED" | undefined): Promise<void> {
  const { generation } = await rowOf();
  await plane.deps.db
    .updateTable("sandboxes")
    .set({
      ...{ status: "resuming", host_id: near.id, moving_from: home.id, operation_deadline: new Date(0) },
      ...{ generation: generation + 2n, command_generation: generation + 2n },
    })
    .where("id", "=", id)
    .execute();
  if (!there) return;
  const made = home.agent.sandboxes.get(id);
  assert.ok(made);
  near.agent.sandboxes.set(id, { ...made, phase: there, generation: generation + 2n });
}

test("calls into the guest find it where it is, also from a replica that knew where it was", async () => {
  await change(home, { draining: false });
  await resume();
  await plane.services.pingSandbox(caller, id);
  await plane.services.pauseSandbox(caller, id);
  await change(home, { draining: true });
  await resume();
  await plane.services.pingSandbox(caller, id);
  assert.equal(near.agent.callsOf("pingSandbox").length, 1);
  await assertOnlyOn(near, "RUNNING");
});
