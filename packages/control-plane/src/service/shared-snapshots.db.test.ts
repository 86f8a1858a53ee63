/** Snapshots of hosts that share an object store. */
import assert from "node:assert/strict";
import { beforeEach, test } from "vitest";
import { findSnapshot } from "../db/snapshots.ts";
import { HostMonitor } from "../hosts/host-monitor.ts";
import { failing, holding } from "../hosts/testing/fake-agent.ts";
import type { SnapshotId } from "../model/ids.ts";
import type { Caller, Snapshot } from "./services.ts";
import { DEFAULTS, LOAD, type TestHost, type TestPlane, useTestPlane } from "./testing/test-plane.ts";

const COMPAT = `${"c".repeat(64)}-tsc2096023`;
const openPlane = useTestPlane();
const forever = new AbortController().signal;
let plane: TestPlane;
let caller: Caller;
/** Of this test alone: tests of a file share its database. */
let store: string;
/** The one that makes all snapshots, and one that shares its store. */
let maker: TestHost;
let other: TestHost;

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
  maker = await newHost();
  other = await newHost();
});

async function newHost(says: { compat: string; storeId?: string } = { compat: COMPAT, storeId: store }) {
  const host = await plane.newHost();
  host.agent.compat = says.compat;
  await beat(host, says);
  return host;
}

const beat = ({ id, accessToken, agent }: TestHost, snapshots?: { compat: string; storeId?: string }) =>
  plane.services.heartbeat(accessToken, id, {
    ...{ load: LOAD, digest: "d", eventLogId: agent.logId, lastEventNumber: 0n },
    snapshots: snapshots ?? { compat: COMPAT, storeId: store },
  });

const change = (host: TestHost, set: { draining?: boolean; status?: "online" | "unreachable" }) =>
  plane.deps.db.updateTable("hosts").set(set).where("id", "=", host.id).execute();

async function makeSnapshot(name: string): Promise<Snapshot> {
  await change(other, { draining: true });
  const { id } = await plane.services.createSandbox(caller, DEFAULTS);
  assert.ok(maker.agent.sandboxes.has(id));
  await change(other, { draining: false });
  return plane.services.createSnapshot(caller, { sandboxId: id, name, overwrite: false });
}

/** A round of the monitor after the maker has sent it. */
async function send(id: SnapshotId): Promise<void> {
  maker.agent.stored.set(id, store);
  await look(maker);
  assert.equal((await findSnapshot(plane.deps.db, caller.teamId, id))?.storeId, store);
}

async function look(host: TestHost): Promise<void> {
  const { db } = plane.deps;
  await db
    .updateTable("hosts")
    .set({ next_check_at: new Date(0) })
    .where("id", "=", host.id)
    .execute();
  const monitor = new HostMonitor(plane.deps, {
    everyMs: 3_600_000,
    compareEveryMs: 3_600_000,
    silentMs: 90_000,
    limitMs: 10_000,
    batch: 50,
  });
  await monitor.round(forever);
}

const startFrom = (template: string) => plane.services.createSandbox(caller, { ...DEFAULTS, template });
const copies = async (id: SnapshotId) => {
  const rows = await plane.deps.db
    .selectFrom("snapshot_copies")
    .select(["host_id", "deleting"])
    .where("snapshot_id", "=", id)
    .execute();
  return new Map(rows.map((row) => [row.host_id, row.deleting]));
};

test("a snapshot starts sandboxes on another host once it is in the store that both use", async () => {
  const { id } = await makeSnapshot("shared");
  await change(maker, { draining: true });
  await assert.rejects(startFrom("shared"), { code: "no_capacity" });
  await look(maker);
  await assert.rejects(startFrom("shared"), { code: "no_capacity" }, "the maker has not sent it");
  await send(id);
  const made = await startFrom("shared");
  assert.equal(made.hostId, other.id);
  assert.equal(other.agent.sandboxes.get(made.id)?.source, id);
  assert.deepEqual(
    await copies(id),
    new Map([
      [maker.id, false],
      [other.id, false],
    ]),
  );
});

test("a host that has it comes before one that would fetch it", async () => {
  const { id } = await makeSnapshot("near");
  await send(id);
  for (let n = 0; n < 4; n += 1) assert.equal((await startFrom("near")).hostId, maker.id);
  // No room there: the other one fetches it.
  maker.agent.before = failing("createSandbox", "no_capacity");
  assert.equal((await startFrom("near")).hostId, other.id);
});

test("no host is asked that has another CPU or another store, or says nothing", async () => {
  const { id } = await makeSnapshot("picky");
  await send(id);
  await change(maker, { draining: true });
  await change(other, { draining: true });
  await newHost({ compat: `${"d".repeat(64)}-tsc2096023`, storeId: store });
  await newHost({ compat: `${"c".repeat(64)}-tsc2400000`, storeId: store });
  await newHost({ compat: COMPAT, storeId: "another" });
  await newHost({ compat: COMPAT });
  await plane.newHost();
  await assert.rejects(startFrom("picky"), { code: "no_capacity" });
  const fits = await newHost({ compat: `${"c".repeat(64)}-tsc2096022`, storeId: store });
  assert.equal((await startFrom("picky")).hostId, fits.id);
});

test("a deletion reaches all hosts that have it; one that is silent is told when it is back", async () => {
  const { id } = await makeSnapshot("gone");
  await send(id);
  await change(maker, { draining: true });
  await startFrom("gone");
  other.agent.snapshots.add(id);
  await change(other, { status: "unreachable" });
  await plane.services.deleteSnapshot(caller, "gone");
  assert.ok(!maker.agent.snapshots.has(id));
  assert.ok(other.agent.snapshots.has(id));
  assert.equal(await findSnapshot(plane.deps.db, caller.teamId, id), undefined);
  assert.deepEqual(await copies(id), new Map([[other.id, true]]));
  await beat(other);
  await look(other);
  assert.ok(!other.agent.snapshots.has(id));
  assert.deepEqual(await copies(id), new Map());
});

test("when no host that has it can be reached, another one takes it from the store", async () => {
  const { id } = await makeSnapshot("orphan");
  await send(id);
  await change(maker, { status: "unreachable" });
  await plane.services.deleteSnapshot(caller, "orphan");
  assert.deepEqual(
    other.agent.callsOf("deleteSnapshot").map((call) => call.id),
    [id],
  );
  assert.deepEqual(await copies(id), new Map([[maker.id, true]]));
});

test("a host that fails to delete it is asked again, and nobody uses it meanwhile", async () => {
  const { id } = await makeSnapshot("sticky");
  maker.agent.before = failing("deleteSnapshot", "host_error");
  await plane.services.deleteSnapshot(caller, "sticky");
  await assert.rejects(startFrom("sticky"), { code: "template_not_found" });
  assert.deepEqual(await copies(id), new Map([[maker.id, true]]));
  maker.agent.before = () => undefined;
  await look(maker);
  assert.ok(!maker.agent.snapshots.has(id));
  assert.deepEqual(await copies(id), new Map());
});

test("a sandbox whose snapshot is deleted before its host is told ends, and leaves no copy behind", async () => {
  const { id } = await makeSnapshot("racing");
  await send(id);
  // Refused by the first host, it comes to the second after the deletion.
  const held = holding("createSandbox");
  maker.agent.before = held.hook;
  maker.agent.after = failing("createSandbox", "no_capacity");
  const starting = assert.rejects(startFrom("racing"), { code: "template_not_found" });
  await held.arrived;
  await plane.services.deleteSnapshot(caller, "racing");
  held.release();
  await starting;
  assert.equal(other.agent.callsOf("createSandbox").length, 0);
  assert.deepEqual(await copies(id), new Map());
});

test("a host that is deleted takes only those snapshots with it that are nowhere else", async () => {
  const stays = await makeSnapshot("stays");
  await send(stays.id);
  await makeSnapshot("goes");
  const platform = await plane.newCaller("platform");
  const preview = await plane.services.previewHostDeletion(platform, maker.id);
  assert.deepEqual(
    preview.snapshots.map(({ name }) => name),
    ["goes"],
  );
  await plane.services.deleteHost(platform, maker.id, { force: true });
  const { items } = await plane.services.listSnapshots(caller, { limit: 10 });
  assert.deepEqual(
    items.map(({ name }) => name),
    ["stays"],
  );
  assert.equal((await startFrom("stays")).hostId, other.id);
  await plane.services.deleteSnapshot(caller, "stays");
  assert.deepEqual(
    other.agent.callsOf("deleteSnapshot").map((call) => call.id),
    [stays.id],
  );
  assert.deepEqual(await copies(stays.id), new Map());
});
