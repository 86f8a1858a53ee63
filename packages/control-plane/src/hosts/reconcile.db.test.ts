import assert from "node:assert/strict";
import { beforeEach, expect, test } from "vitest";
import { findHost } from "../db/hosts.ts";
import { moveSandbox } from "../db/sandboxes.ts";
import { claimOverdueSnapshots, insertSnapshot } from "../db/snapshots.ts";
import { teamQuota } from "../db/teams.ts";
import type { SandboxId } from "../model/ids.ts";
import { factsOf } from "../service/testing/test-plane.ts";
import { DeadlineSweep } from "./deadline-sweep.ts";
import { HostMonitor } from "./host-monitor.ts";
import { failing, holding } from "./testing/fake-agent.ts";
import { type OnlyHost, useOnlyHost } from "./testing/only-host.ts";

const open = useOnlyHost();
const forever = new AbortController().signal;
let { plane, host, caller, create, rowOf, fakeOf, beat } = {} as OnlyHost;
let monitor: HostMonitor;
let sweep: DeadlineSweep;

beforeEach(async () => {
  ({ plane, host, caller, create, rowOf, fakeOf, beat } = await open());
  monitor = new HostMonitor(plane.deps, {
    everyMs: 0,
    silentMs: 90_000,
    limitMs: 1_000,
    batch: 50,
    compareEveryMs: 600_000,
  });
  sweep = new DeadlineSweep(plane.deps, { batch: 50, leaseMs: 30_000, againMs: 0, silentAgainMs: 60_000 });
});

const hostRow = async () => findHost(plane.deps.db, "all", host.id);
const silence = (ms: number) =>
  plane.deps.db
    .updateTable("hosts")
    .set({ last_heartbeat_at: new Date(Date.now() - ms) })
    .where("id", "=", host.id)
    .execute();
/** A row whose replica died while a host was at it. */
async function abandon(id: SandboxId, event: "pause" | "resume" | "destroy"): Promise<void> {
  assert.ok(await moveSandbox(plane.deps.db, await rowOf(id), event, { deadlineMs: -1 }));
}
const makeOverdue = (id: SandboxId) =>
  plane.deps.db
    .updateTable("sandboxes")
    .set({ operation_deadline: new Date(0) })
    .where("id", "=", id)
    .execute();

test("a host that went silent is unreachable, its running sandboxes missing, and all returns with it", async () => {
  const running = await create();
  const paused = await create();
  await plane.services.pauseSandbox(caller, paused);
  await silence(91_000);
  await monitor.round(forever);
  assert.equal((await hostRow())?.status, "unreachable");
  assert.equal((await rowOf(running)).status, "missing");
  assert.equal((await rowOf(paused)).status, "paused");
  await assert.rejects(plane.services.pingSandbox(caller, running), { code: "host_unreachable" });
  await beat();
  await monitor.round(forever);
  assert.equal((await hostRow())?.status, "online");
  assert.equal((await rowOf(running)).status, "running");
});

test("a host that registered again and was never heard loses its running sandboxes like a silent one", async () => {
  const id = await create();
  const { db } = plane.deps;
  await db.updateTable("hosts").set({ status: "unreachable" }).where("id", "=", host.id).execute();
  const { registrationToken } = await plane.services.newRegistrationToken(
    await plane.newCaller("platform"),
    host.id,
  );
  await plane.services.registerHost(factsOf(host.agent, registrationToken));
  await monitor.round(forever);
  assert.equal((await rowOf(id)).status, "running", "it has its time to begin");
  await silence(91_000);
  await monitor.round(forever);
  assert.equal((await rowOf(id)).status, "missing");
});

test("no host is given up right after an outage of ours", async () => {
  const id = await create();
  await silence(3_600_000);
  await plane.deps.db
    .updateTable("cluster")
    .set({ receptive_at: new Date(Date.now() - 3_600_000) })
    .execute();
  await monitor.round(forever);
  assert.equal((await hostRow())?.status, "online");
  assert.equal((await rowOf(id)).status, "running");
});

test("a missing sandbox whose destroy was asked for is destroyed when its host returns", async () => {
  const id = await create();
  await silence(91_000);
  await monitor.round(forever);
  await plane.services.destroySandbox(caller, id);
  assert.equal((await rowOf(id)).status, "stopping");
  await makeOverdue(id);
  await sweep.round();
  assert.equal((await rowOf(id)).status, "stopping", "nobody can say that it is gone");
  await beat();
  await makeOverdue(id);
  await sweep.round();
  assert.equal((await rowOf(id)).status, "stopped");
  assert.ok(!host.agent.sandboxes.has(id));
});

test("rows become what their host says: paused, gone, or dead with the reason", async () => {
  const [paused, gone, dead, well, lost] = [
    await create(),
    await create(),
    await create(),
    await create(),
    await create(),
  ];
  await plane.services.pauseSandbox(caller, lost);
  fakeOf(paused).phase = "PAUSED";
  host.agent.sandboxes.delete(gone);
  fakeOf(dead).phase = "FAILED";
  fakeOf(dead).exit = { code: "out_of_disk", message: "the guest's disk is full" };
  host.agent.sandboxes.delete(lost);
  await monitor.round(forever);
  assert.equal((await rowOf(paused)).status, "paused");
  assert.equal((await rowOf(gone)).status, "stopped");
  assert.deepEqual((await rowOf(dead)).error, { code: "out_of_disk", message: "the guest's disk is full" });
  assert.ok(!host.agent.sandboxes.has(dead), "what was left of it was released");
  assert.equal((await rowOf(well)).status, "running");
  assert.equal((await rowOf(lost)).status, "error");
  assert.equal((await teamQuota(plane.deps.db, caller.teamId))?.live, 2);
});

test("what moved while the host was asked is left for the next round", async () => {
  const id = await create();
  const hold = holding("listSandboxes");
  host.agent.after = hold.hook;
  const round = monitor.round(forever);
  await hold.arrived;
  // The answer on its way says "running".
  await plane.services.pauseSandbox(caller, id);
  const born = await create();
  hold.release();
  await round;
  assert.equal((await rowOf(id)).status, "paused");
  assert.equal((await rowOf(born)).status, "running");
  assert.ok(host.agent.sandboxes.has(born));
});

test("work under way is not judged by the monitor", async () => {
  const hold = holding("createSandbox");
  host.agent.before = hold.hook;
  const creating = create();
  await hold.arrived;
  await monitor.round(forever);
  hold.release();
  assert.equal((await rowOf(await creating)).status, "running");
});

test("a VM whose row is final, or names another host, is destroyed", async () => {
  const id = await create();
  await moveSandbox(plane.deps.db, await rowOf(id), "died", { error: { code: "internal", message: "x" } });
  await monitor.round(forever);
  assert.ok(!host.agent.sandboxes.has(id));

  const elsewhere = await create();
  const other = await plane.newHost();
  await plane.deps.db
    .updateTable("sandboxes")
    .set({ host_id: other.id })
    .where("id", "=", elsewhere)
    .execute();
  other.agent.sandboxes.set(elsewhere, { ...fakeOf(elsewhere) });
  await monitor.round(forever);
  assert.ok(!host.agent.sandboxes.has(elsewhere));
  assert.ok(other.agent.sandboxes.has(elsewhere));
  assert.equal((await rowOf(elsewhere)).status, "running");
});

test("a host that knows newer generations than the database is not commanded: the database is the old one", async () => {
  const id = await create();
  fakeOf(id).generation = 99n;
  fakeOf(id).phase = "FAILED";
  await monitor.round(forever);
  assert.equal((await rowOf(id)).status, "running");
  assert.ok(host.agent.sandboxes.has(id));
  assert.ok(plane.log.some(({ level, words }) => level === "error" && /older backup/.test(words)));
});

test("a row that moved between our reading it and its host's answer is no alarm", async () => {
  const id = await create();
  const hold = holding("listSandboxes");
  host.agent.before = hold.hook;
  const round = monitor.round(forever);
  await hold.arrived;
  await plane.services.pauseSandbox(caller, id);
  hold.release();
  await round;
  assert.equal((await rowOf(id)).status, "paused");
  assert.ok(!plane.log.some(({ facts, words }) => facts["sandbox"] === id && /older backup/.test(words)));
});

test("a hung host delays only itself", async () => {
  const other = await plane.newHost();
  const hold = holding("listSandboxes");
  host.agent.before = hold.hook;
  await monitor.round(forever);
  assert.equal(other.agent.callsOf("listSandboxes").length, 1);
  assert.ok(plane.log.some(({ facts }) => facts["host"] === host.id));
  hold.release();
});

test("a host that hangs at a release holds up the round by its limit at most", async () => {
  const id = await create();
  await moveSandbox(plane.deps.db, await rowOf(id), "died", { error: { code: "internal", message: "x" } });
  const hold = holding("destroySandbox");
  host.agent.before = hold.hook;
  const round = monitor.round(forever);
  await hold.arrived;
  await round;
  assert.ok(host.agent.sandboxes.has(id));
  hold.release();
  await expect.poll(() => host.agent.sandboxes.has(id)).toBe(false);
});

test("a host that hangs holds up the sweep by its lease at most, and no other host's rows", async () => {
  const stuck = [await create(), await create(), await create()];
  for (const id of stuck) await abandon(id, "destroy");
  const other = await plane.newHost();
  await plane.deps.db.updateTable("hosts").set({ draining: true }).where("id", "=", host.id).execute();
  const free = await create();
  await abandon(free, "destroy");
  const hold = holding("destroySandbox");
  host.agent.before = hold.hook;
  const quick = { batch: 50, leaseMs: 3_000, againMs: 0, silentAgainMs: 60_000 };
  const round = new DeadlineSweep(plane.deps, quick).round();
  await expect.poll(async () => (await rowOf(free)).status, { timeout: 2_500 }).toBe("stopped");
  assert.ok(!other.agent.sandboxes.has(free));
  await round;
  assert.equal(host.agent.callsOf("destroySandbox").length, 2, "two at once, and none after the lease");
  for (const id of stuck) assert.equal((await rowOf(id)).status, "stopping");
  hold.release();
});

test("each due host is checked by one replica", async () => {
  const slow = { everyMs: 60_000, silentMs: 90_000, limitMs: 1_000, batch: 50, compareEveryMs: 600_000 };
  const monitors = Array.from({ length: 4 }, () => new HostMonitor(plane.deps, slow));
  await Promise.all(monitors.map((each) => each.round(forever)));
  assert.equal(host.agent.callsOf("listSandboxes").length, 1);
});

test("the sweep settles a create whose replica died, whatever the host made of it", async () => {
  const [made, never, failed] = [await create(), await create(), await create()];
  const { db } = plane.deps;
  const backToStarting = {
    status: "starting",
    generation: 1n,
    operation_deadline: new Date(0),
    started_at: null,
  } as const;
  for (const id of [made, never, failed]) {
    await db.updateTable("sandboxes").set(backToStarting).where("id", "=", id).execute();
  }
  host.agent.sandboxes.delete(never);
  fakeOf(failed).phase = "FAILED";
  fakeOf(failed).exit = { code: "guest_error", message: "the kernel panicked" };
  await sweep.round();
  assert.equal((await rowOf(made)).status, "running");
  assert.ok((await rowOf(made)).startedAt);
  assert.deepEqual([(await rowOf(never)).status, (await rowOf(never)).error?.code], ["error", "host_error"]);
  assert.equal((await rowOf(failed)).error?.message, "the kernel panicked");
  assert.ok(!host.agent.sandboxes.has(failed));
  assert.equal((await teamQuota(db, caller.teamId))?.live, 1);
});

test("a create that reaches its host after the sweep gave it up makes nothing", async () => {
  const hold = holding("createSandbox");
  host.agent.before = hold.hook;
  const creating = create();
  await hold.arrived;
  const { items } = await plane.services.listSandboxes(caller, {
    statuses: ["starting"],
    metadata: {},
    limit: 1,
  });
  const id = items[0]?.id as SandboxId;
  await makeOverdue(id);
  await sweep.round();
  assert.equal((await rowOf(id)).status, "error");
  hold.release();
  await assert.rejects(creating, { code: "wrong_state" });
  assert.ok(!host.agent.sandboxes.has(id));
});

test("a create that its host is still at is looked at again, not given up", async () => {
  const id = await create();
  const backToStarting = { status: "starting", generation: 1n, operation_deadline: new Date(0) } as const;
  await plane.deps.db.updateTable("sandboxes").set(backToStarting).where("id", "=", id).execute();
  fakeOf(id).phase = "STARTING";
  await sweep.round();
  assert.equal((await rowOf(id)).status, "starting");
  fakeOf(id).phase = "RUNNING";
  await sweep.round();
  assert.equal((await rowOf(id)).status, "running");
});

test("the sweep settles pauses, resumes and destroys that were cut short", async () => {
  const [notPaused, isPaused, notResumed, isResumed, toEnd] = [
    await create(),
    await create(),
    await create(),
    await create(),
    await create(),
  ];
  await plane.services.pauseSandbox(caller, notResumed);
  await plane.services.pauseSandbox(caller, isResumed);
  await abandon(notPaused, "pause");
  await abandon(isPaused, "pause");
  fakeOf(isPaused).phase = "PAUSED";
  await abandon(notResumed, "resume");
  await abandon(isResumed, "resume");
  fakeOf(isResumed).phase = "RUNNING";
  await abandon(toEnd, "destroy");
  await sweep.round();
  const shown = async (id: SandboxId) => [(await rowOf(id)).status, (await rowOf(id)).error?.message];
  assert.deepEqual(await shown(notPaused), ["running", "The pause did not happen."]);
  assert.deepEqual(await shown(isPaused), ["paused", undefined]);
  assert.deepEqual(await shown(notResumed), ["paused", "The resume did not happen."]);
  assert.deepEqual(await shown(isResumed), ["running", undefined]);
  assert.deepEqual(await shown(toEnd), ["stopped", undefined]);
  assert.ok(!host.agent.sandboxes.has(toEnd));
});

test("work on a host that went silent is missing until the host says what became of it", async () => {
  const id = await create();
  await abandon(id, "pause");
  await plane.deps.db.updateTable("hosts").set({ status: "unreachable" }).where("id", "=", host.id).execute();
  await sweep.round();
  assert.equal((await rowOf(id)).status, "missing");
  fakeOf(id).phase = "PAUSED";
  await beat();
  await monitor.round(forever);
  assert.equal((await rowOf(id)).status, "paused");
});

test("a sandbox that no host took in time is an error", async () => {
  const id = await create();
  const pending = { status: "pending", host_id: null, operation_deadline: new Date(0) } as const;
  await plane.deps.db.updateTable("sandboxes").set(pending).where("id", "=", id).execute();
  await sweep.round();
  assert.deepEqual([(await rowOf(id)).status, (await rowOf(id)).error?.code], ["error", "no_capacity"]);
});

test("what can't be settled now is overdue again, and the others are not held up", async () => {
  const [stuck, free] = [await create(), await create()];
  await abandon(stuck, "destroy");
  await abandon(free, "pause");
  host.agent.before = failing("destroySandbox", "host_error");
  await sweep.round();
  assert.equal((await rowOf(stuck)).status, "stopping");
  assert.ok((await rowOf(stuck)).operationDeadline);
  assert.equal((await rowOf(free)).status, "running");
});

test("a snapshot that was cut short is deleted on its host and forgotten", async () => {
  const id = plane.deps.ids.snapshot();
  host.agent.snapshots.add(id);
  const shape = { vcpus: 1, memoryMb: 512, diskMb: 4096 };
  await insertSnapshot(plane.deps.db, {
    id,
    teamId: caller.teamId,
    name: "half",
    hostId: host.id,
    ...shape,
    deadlineMs: -1,
  });
  await sweep.round();
  assert.ok(!host.agent.snapshots.has(id));
  assert.deepEqual(await claimOverdueSnapshots(plane.deps.db, { limit: 10, leaseMs: 0 }), []);
});
