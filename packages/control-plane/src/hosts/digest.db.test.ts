/** The monitor asks only those hosts for their sandboxes that may have others than our rows say. */
import assert from "node:assert/strict";
import { Registry } from "prom-client";
import { beforeEach, test } from "vitest";
import type { CompareReason } from "../db/hosts.ts";
import { findSandbox } from "../db/sandboxes.ts";
import type { SandboxId } from "../model/ids.ts";
import type { Caller } from "../service/services.ts";
import {
  DEFAULTS,
  LOAD,
  type TestHost,
  type TestPlane,
  useTestPlane,
} from "../service/testing/test-plane.ts";
import { HostMonitor } from "./host-monitor.ts";
import { monitorMetrics } from "./monitor-metrics.ts";
import { failing, holding } from "./testing/fake-agent.ts";

const openPlane = useTestPlane();
const forever = new AbortController().signal;
let plane: TestPlane;
let host: TestHost;
let caller: Caller;
let checks: (CompareReason | "not")[];

beforeEach(async () => {
  plane = await openPlane();
  // One host and nothing else to do: tests of a file share its database.
  await plane.deps.db
    .updateTable("hosts")
    .set({ draining: true, next_check_at: new Date("2100-01-01") })
    .execute();
  host = await plane.newHost();
  caller = await plane.newCaller();
  checks = [];
});

const OPTIONS = { everyMs: 0, silentMs: 90_000, limitMs: 10_000, batch: 50, compareEveryMs: 600_000 };
const monitorOf = (of: TestPlane, options: Partial<typeof OPTIONS> = {}) =>
  new HostMonitor(of.deps, { ...OPTIONS, ...options, onCheck: (compared) => checks.push(compared) });
const round = () => monitorOf(plane).round(forever);
const beat = (digest = host.agent.digest) =>
  plane.services.heartbeat(host.accessToken, host.id, {
    ...{ load: LOAD, digest, eventLogId: host.agent.logId, lastEventNumber: 0n },
  });
/** A heartbeat and a round: why the host was compared, or that it was not. */
async function look(): Promise<CompareReason | "not" | undefined> {
  checks = [];
  await beat();
  await round();
  assert.equal(checks.length, 1);
  return checks[0];
}
const create = async (): Promise<SandboxId> => (await plane.services.createSandbox(caller, DEFAULTS)).id;
const statusOf = async (id: SandboxId) => (await findSandbox(plane.deps.db, caller.teamId, id))?.status;

test("a host whose digest agrees is not asked for its sandboxes, whatever was done with them", async () => {
  assert.equal(await look(), "due", "once, since it registered");
  const [one, two, three] = [await create(), await create(), await create()];
  assert.equal(await look(), "not");
  await plane.services.pauseSandbox(caller, one);
  await plane.services.pauseSandbox(caller, two);
  await plane.services.resumeSandbox(caller, two);
  await plane.services.createSnapshot(caller, { sandboxId: two, name: "s", overwrite: false });
  assert.equal(await look(), "not");
  await plane.services.destroySandbox(caller, three);
  assert.equal(await look(), "not");
  assert.equal(host.agent.callsOf("listSandboxes").length, 1);
});

test("commands that failed, were refused, or whose answers were lost leave the digests agreeing", async () => {
  const id = await create();
  await look();
  host.agent.before = failing("pauseSandbox", "host_error");
  await assert.rejects(plane.services.pauseSandbox(caller, id), { code: "host_error" });
  assert.equal(await look(), "not");
  host.agent.before = () => undefined;
  host.agent.after = failing("pauseSandbox", "timeout");
  await plane.services.pauseSandbox(caller, id);
  assert.equal(await look(), "not");
  host.agent.before = failing("resumeSandbox", "no_capacity");
  await assert.rejects(plane.services.resumeSandbox(caller, id), { code: "no_capacity" });
  assert.equal(await look(), "not");
});

test("what a host did by itself, or lost, shows with its next heartbeat, and is settled", async () => {
  const [paused, gone, dead, kept] = [await create(), await create(), await create(), await create()];
  assert.equal(await look(), "due");
  const { sandboxes } = host.agent;
  Object.assign(sandboxes.get(paused) ?? {}, { phase: "PAUSED" });
  Object.assign(sandboxes.get(dead) ?? {}, { phase: "FAILED", exit: { code: "guest_error", message: "x" } });
  sandboxes.delete(gone);
  assert.equal(await look(), "differs");
  assert.deepEqual(await Promise.all([paused, gone, dead, kept].map(statusOf)), [
    "paused",
    "stopped",
    "error",
    "running",
  ]);
  assert.equal(await look(), "not");
});

test("what is missing keeps a host in view until it is found", async () => {
  const id = await create();
  await look();
  const { db } = plane.deps;
  await db
    .updateTable("hosts")
    .set({ last_heartbeat_at: new Date(0) })
    .where("id", "=", host.id)
    .execute();
  await db
    .updateTable("cluster")
    .set({ receptive_since: new Date(0), receptive_at: new Date() })
    .execute();
  await round();
  assert.equal(await statusOf(id), "missing");
  host.agent.before = failing("listSandboxes", "host_error");
  assert.equal(await look(), "differs");
  assert.equal(await statusOf(id), "missing");
  host.agent.before = () => undefined;
  assert.equal(await look(), "differs");
  assert.equal(await statusOf(id), "running");
  assert.equal(await look(), "not");
});

test("a sandbox that no row knows keeps a host in view", async () => {
  await look();
  const stranger = "sbzzzzzzzzzzzzzzzzzz";
  host.agent.sandboxes.set(stranger, {
    ...{ phase: "RUNNING" as const, generation: 1n, source: "base", envdAccessToken: "", timeoutSec: 0 },
  });
  for (let i = 0; i < 2; i++) assert.equal(await look(), "differs");
  assert.ok(plane.log.some(({ level, words }) => level === "error" && /no row knows/.test(words)));
});

test("a host that lies about its digest is compared all the same, in its time", async () => {
  const id = await create();
  const honest = host.agent.digest;
  await look();
  host.agent.sandboxes.delete(id);
  await beat(honest);
  await round();
  assert.equal(await statusOf(id), "running");
  await monitorOf(plane, { compareEveryMs: 1 }).round(forever);
  assert.equal(checks.at(-1), "due");
  assert.equal(await statusOf(id), "stopped");
});

test("a comparison that did not come to its end is done again", async () => {
  const held = holding("listSandboxes");
  host.agent.before = held.hook;
  await beat();
  await monitorOf(plane, { limitMs: 50 }).round(forever);
  held.release();
  host.agent.before = () => undefined;
  assert.equal(await look(), "due");
  assert.equal(await look(), "not");
});

test("a row that knows another command than its host was told learns it, and they agree", async () => {
  const id = await create();
  await look();
  await plane.services.pauseSandbox(caller, id);
  await plane.deps.db.updateTable("sandboxes").set({ command_generation: 1n }).where("id", "=", id).execute();
  assert.equal(await look(), "differs");
  assert.equal(await look(), "not");
});

test("two replicas ask a host that differs once, and the figures say how many were asked", async () => {
  const replica = await openPlane();
  const registry = new Registry();
  const metrics = monitorMetrics(registry);
  const monitors = [plane, replica].map(
    ({ deps }) => new HostMonitor(deps, { ...OPTIONS, everyMs: 60_000, ...metrics }),
  );
  await beat();
  await Promise.all(monitors.map((each) => each.round(forever)));
  assert.equal(host.agent.callsOf("listSandboxes").length, 1);
  const text = await registry.metrics();
  assert.match(text, /rookery_host_checks_total\{compared="due"\} 1/);
  assert.match(text, /rookery_host_checks_total\{compared="not"\} 0/);
  const line = [...plane.log, ...replica.log].find(({ words }) => words === "hosts were checked");
  assert.deepEqual(line?.facts, { hosts: 1, compared: 1 });
});
