/** What hosts did by themselves, read from their logs. */
import assert from "node:assert/strict";
import { sql } from "kysely";
import { beforeEach, expect, test } from "vitest";
import { claimEventReading } from "../db/host-event-reading.ts";
import type { SandboxId } from "../model/ids.ts";
import type { TestHost } from "../service/testing/test-plane.ts";
import { EventReader } from "./event-reader.ts";
import { failing } from "./testing/fake-agent.ts";
import { type OnlyHost, useOnlyHost } from "./testing/only-host.ts";

const open = useOnlyHost();
let { plane, host, caller, create, rowOf, fakeOf, beat } = {} as OnlyHost;

beforeEach(async () => {
  ({ plane, host, caller, create, rowOf, fakeOf, beat } = await open());
});

test("a claim on a host's events is written anew only when it has aged, and answered each time", async () => {
  const leaseMs = 9_000;
  const claim = async (reader: string) =>
    (await claimEventReading(plane.deps.db, { reader, leaseMs, limit: 1_000 })).some(
      ({ id }) => id === host.id,
    );
  const row = () =>
    plane.deps.db
      .selectFrom("hosts")
      .select([
        "event_reader",
        sql<string>`xmin`.as("version"),
        sql<number>`extract(epoch from event_reader_until - now())::float8`.as("left_sec"),
      ])
      .where("id", "=", host.id)
      .executeTakeFirstOrThrow();
  const age = (leftSec: number) =>
    plane.deps.db
      .updateTable("hosts")
      .set({ event_reader_until: sql<Date>`now() + make_interval(secs => ${leftSec})` })
      .where("id", "=", host.id)
      .execute();
  assert.equal(await claim("replica-a"), true);
  const claimedRow = await row();
  assert.equal(await claim("replica-a"), true);
  assert.equal((await row()).version, claimedRow.version, "nothing was written");
  assert.equal(await claim("replica-b"), false);

  await age(5);
  assert.equal(await claim("replica-b"), false);
  assert.equal(await claim("replica-a"), true);
  assert.ok((await row()).left_sec > 6, "renewed");

  await age(-1);
  assert.equal(await claim("replica-b"), true);
  assert.equal((await row()).event_reader, "replica-b");
  assert.equal(await claim("replica-a"), false);
});

function openReader(name: string): EventReader {
  return new EventReader(plane.deps, { reader: name, leaseMs: 10_000, maxHosts: 100, againMs: 10 });
}

test("what a host did by itself reaches the row, and is acknowledged after", async () => {
  const [paused, dead, ended] = [await create(), await create(), await create()];
  const reader = openReader("replica-a");
  await reader.round();
  try {
    host.agent.emit({ sandboxId: paused, kind: "paused", reason: "expired" }, "PAUSED");
    fakeOf(dead).exit = { code: "guest_error", message: "panic" };
    host.agent.emit({ sandboxId: dead, kind: "failed", reason: "guest_crashed", message: "panic" }, "FAILED");
    host.agent.emit({ sandboxId: ended, kind: "stopped", reason: "expired" });
    await expect.poll(() => host.agent.acknowledged, { timeout: 5_000 }).toBe(3n);
    assert.equal((await rowOf(paused)).status, "paused");
    assert.deepEqual((await rowOf(dead)).error, { code: "guest_error", message: "panic" });
    assert.equal((await rowOf(ended)).status, "stopped");
    assert.ok(!host.agent.sandboxes.has(dead));
    assert.equal((await beat()).acknowledgedEvent, 3n);
  } finally {
    await reader.close();
  }
});

test("the row follows within 2 s, without any round, and its event says why", async () => {
  const ids = await Promise.all(Array.from({ length: 5 }, create));
  const reader = openReader("replica-a");
  await reader.round();
  try {
    await expect.poll(() => host.agent.callsOf("streamEvents").length, { timeout: 5_000 }).toBe(1);
    for (const id of ids) {
      const began = performance.now();
      host.agent.emit({ sandboxId: id, kind: "paused", reason: "expired" }, "PAUSED");
      await expect
        .poll(async () => (await rowOf(id)).status, { interval: 5, timeout: 10_000 })
        .toBe("paused");
      assert.ok(performance.now() - began < 2_000, `${performance.now() - began} ms`);
    }
    const { items } = await plane.services.listSandboxEvents(caller, ids[0] as SandboxId, { limit: 1 });
    assert.deepEqual([items[0]?.status, items[0]?.reason], ["paused", "expired"]);
  } finally {
    await reader.close();
  }
});

test("a host that lies in its events harms no sandbox but its own, and holds up nothing", async () => {
  const own = await create();
  const other = await plane.newHost();
  const drain = (id: TestHost["id"]) =>
    plane.deps.db
      .updateTable("hosts")
      .set({ draining: true, next_check_at: new Date("2100-01-01") })
      .where("id", "=", id)
      .execute();
  await drain(host.id);
  const foreign = await create();
  const reader = openReader("replica-a");
  try {
    assert.equal((await rowOf(foreign)).hostId, other.id);
    for (let index = 0; index < 20; index++) {
      host.agent.emit({ sandboxId: foreign, kind: "failed", reason: "x", generation: 1n });
      host.agent.emit({ sandboxId: "../etc/passwd", kind: "failed", reason: "x" });
      host.agent.emit({ sandboxId: plane.deps.ids.sandbox(), kind: "no such kind", reason: "x" });
    }
    const message = `\0${"long ".repeat(1_000)}`;
    host.agent.emit({ sandboxId: own, kind: "failed", reason: "\0", message }, "FAILED");
    await reader.round();
    await expect.poll(async () => (await rowOf(own)).status, { timeout: 20_000 }).toBe("error");
    assert.equal((await rowOf(foreign)).status, "running");
    const { error } = await rowOf(own);
    assert.ok(error && error.message.length <= 1_000 && error.code === "guest_error");
    await expect.poll(() => host.agent.acknowledged, { timeout: 20_000 }).toBe(61n);
  } finally {
    await reader.close();
    await drain(other.id);
  }
});

test("an event whose acknowledgement is lost is applied once: by who reads next, as read", async () => {
  const id = await create();
  host.agent.before = failing("acknowledgeEvents", "host_error");
  const [first, second] = [openReader("replica-a"), openReader("replica-b")];
  await first.round();
  host.agent.emit({ sandboxId: id, kind: "paused", reason: "expired" }, "PAUSED");
  await expect.poll(async () => (await rowOf(id)).status, { timeout: 10_000 }).toBe("paused");
  await first.close();
  const { generation } = await rowOf(id);
  assert.equal(host.agent.acknowledged, 0n);
  host.agent.before = () => undefined;
  await second.round();
  const next = await create();
  host.agent.emit({ sandboxId: next, kind: "paused", reason: "expired" }, "PAUSED");
  await expect.poll(() => host.agent.acknowledged, { timeout: 10_000 }).toBe(2n);
  await second.close();
  assert.equal((await rowOf(id)).generation, generation);
});

test("an event of an older command does nothing but count as read", async () => {
  const id = await create();
  host.agent.emit({ sandboxId: id, kind: "paused", generation: 1n }, "RUNNING");
  await plane.services.pauseSandbox(caller, id);
  await plane.services.resumeSandbox(caller, id);
  const reader = openReader("replica-a");
  await reader.round();
  await expect.poll(() => host.agent.acknowledged, { timeout: 5_000 }).toBe(1n);
  await reader.close();
  assert.equal((await rowOf(id)).status, "running");
});

test("events that nobody read are read later, each once, by another replica too", async () => {
  const ids = [await create(), await create(), await create()];
  const [first, second] = [openReader("replica-a"), openReader("replica-b")];
  await first.round();
  host.agent.emit({ sandboxId: ids[0] as string, kind: "paused", reason: "expired" }, "PAUSED");
  await expect.poll(() => host.agent.acknowledged, { timeout: 5_000 }).toBe(1n);
  await second.round();
  assert.equal(host.agent.callsOf("streamEvents").length, 1, "one reader at a time");
  await first.close();
  host.agent.emit({ sandboxId: ids[1] as string, kind: "paused", reason: "expired" }, "PAUSED");
  await second.round();
  await expect.poll(() => host.agent.acknowledged, { timeout: 5_000 }).toBe(2n);
  assert.equal(host.agent.callsOf("streamEvents").at(-1)?.generation, 1n, "from where the first one was");
  await second.close();
  assert.equal((await rowOf(ids[1] as SandboxId)).status, "paused");
});

test("a stream that breaks is opened again, from the last number read", async () => {
  const id = await create();
  const reader = openReader("replica-a");
  await reader.round();
  await expect.poll(() => host.agent.callsOf("streamEvents").length).toBe(1);
  host.agent.hangUp();
  host.agent.emit({ sandboxId: id, kind: "paused", reason: "expired" }, "PAUSED");
  await expect.poll(() => host.agent.acknowledged, { timeout: 5_000 }).toBe(1n);
  await reader.close();
});

test("a host whose log was lost is read from the new log's beginning", async () => {
  const [before, after] = [await create(), await create()];
  const reader = openReader("replica-a");
  await reader.round();
  host.agent.emit({ sandboxId: before, kind: "paused", reason: "expired" }, "PAUSED");
  await expect.poll(() => host.agent.acknowledged, { timeout: 5_000 }).toBe(1n);
  await reader.close();
  host.agent.logId = "log-2";
  host.agent.events.length = 0;
  host.agent.emit({ sandboxId: after, kind: "paused", reason: "expired" }, "PAUSED");
  await reader.round();
  await expect.poll(async () => (await rowOf(after)).status, { timeout: 5_000 }).toBe("paused");
  await reader.close();
});
