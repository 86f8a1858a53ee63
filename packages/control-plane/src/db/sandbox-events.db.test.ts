import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import { beforeEach, expect, test } from "vitest";
import { systemClock } from "../model/clock.ts";
import type { HostId, SandboxId, TeamId } from "../model/ids.ts";
import { newIds } from "../model/new-ids.ts";
import { type OpenDatabase, type Queryable, openDatabase } from "./database.ts";
import { insertHost, recordHeartbeat, recordRegistration } from "./hosts.ts";
import {
  dropOldSandboxEvents,
  listSandboxEvents,
  rangeOfEvents,
  sandboxEventsAfter,
} from "./sandbox-events.ts";
import { extendDeadline, insertSandbox, moveSandbox } from "./sandboxes.ts";
import { loseSandboxesOfHost, stopSandboxesOfHost } from "./sandboxes-of-host.ts";
import { insertTeam } from "./teams.ts";
import { openTestDatabase, useTestDatabase } from "./testing/test-database.ts";

const database = useTestDatabase();
const ids = newIds(randomBytes);
let teamId: TeamId;
let hostId: HostId;

async function newTeam(): Promise<TeamId> {
  const id = ids.team();
  await insertTeam(database.db, { id, name: id });
  return id;
}

async function newHost(): Promise<HostId> {
  const id = ids.host();
  const facts = { arch: "x86_64", cpus: 2, memoryMb: 8192, diskMb: 50_000, drivers: {}, version: "1" };
  await insertHost(database.db, { id, name: "h", type: "shared", labels: {} });
  await recordRegistration(database.db, id, { ...facts, address: "127.0.0.1:1", publicKey: "AAAA" });
  const load = { cpus: 0, memoryMbUsed: 0, diskMbFree: 0, sandboxes: 0 };
  await recordHeartbeat(database.db, id, { epoch: 1 }, { load, digest: "", eventLogId: "l" });
  return id;
}

beforeEach(async () => {
  teamId = await newTeam();
  hostId = await newHost();
});

async function insert(
  db: Queryable = database.db,
  where: { teamId: TeamId; hostId: HostId } = { teamId, hostId },
) {
  const shape = { template: "base", vcpus: 1, memoryMb: 512, diskMb: 4096, env: {}, metadata: {} };
  const lifetime = { timeoutSec: 300, onTimeout: "pause" as const, timeoutMode: "idle" as const };
  const id = ids.sandbox();
  const row = await insertSandbox(
    db,
    { ...shape, ...lifetime, ...where, id, deadlineMs: 60_000 },
    { defaultQuota: 10_000 },
  );
  assert.ok(row);
  return row;
}

async function running(where?: { teamId: TeamId; hostId: HostId }) {
  const row = await moveSandbox(database.db, await insert(database.db, where), "seenRunning");
  assert.ok(row);
  return row;
}

const eventsOf = (team: TeamId, after = 0n) =>
  sandboxEventsAfter(database.db, { teamId: team }, after, 1_000);
const numbersOf = async (team: TeamId) => (await eventsOf(team)).map(({ number }) => number);
const upTo = (last: number) => Array.from({ length: last }, (_, index) => BigInt(index + 1));

test("each change of a status is one event, and what changes none is none", async () => {
  const started = await insert();
  assert.ok(await extendDeadline(database.db, started, 60_000));
  const row = await moveSandbox(database.db, started, "seenRunning");
  assert.ok(row);
  const paused = await moveSandbox(database.db, row, "seenPaused", { reason: "expired" });
  assert.ok(paused);
  const error = { code: "guest_error", message: "It is gone." };
  assert.ok(await moveSandbox(database.db, paused, "died", { error }));
  // Compare-and-set: too late, so nothing happened.
  assert.equal(await moveSandbox(database.db, paused, "gone"), undefined);
  const events = await eventsOf(teamId);
  assert.deepEqual(
    events.map(({ number, previousStatus, status, reason }) => [number, previousStatus, status, reason]),
    [
      [1n, undefined, "starting", undefined],
      [2n, "starting", "running", undefined],
      [3n, "running", "paused", "expired"],
      [4n, "paused", "error", undefined],
    ],
  );
  assert.deepEqual(events[3]?.error, error);
  assert.ok(events.every((event) => event.sandboxId === row.id && event.hostId === hostId));
});

test("a host's sandboxes of several teams are told each in its own team", async () => {
  const other = await newTeam();
  const mine = await Promise.all([running(), running(), running()]);
  const theirs = await running({ teamId: other, hostId });
  assert.equal(await loseSandboxesOfHost(database.db, hostId), 4);
  const lost = (await eventsOf(teamId)).filter(({ status }) => status === "missing");
  assert.deepEqual(new Set(lost.map(({ sandboxId }) => sandboxId)), new Set(mine.map(({ id }) => id)));
  assert.ok(lost.every(({ reason }) => reason === "host_silent"));
  assert.deepEqual((await eventsOf(other)).at(-1)?.sandboxId, theirs.id);
  await database.db.transaction().execute((tx) => stopSandboxesOfHost(tx, hostId));
  assert.deepEqual(await numbersOf(teamId), upTo(12));
  assert.deepEqual(await numbersOf(other), upTo(4));
  assert.equal((await eventsOf(other)).at(-1)?.reason, "host_deleted");
});

test("what is rolled back never happened, and takes no number", async () => {
  await insert();
  await assert.rejects(
    database.db.transaction().execute(async (tx) => {
      await insert(tx);
      throw new Error("no");
    }),
  );
  await insert();
  assert.deepEqual(await numbersOf(teamId), [1n, 2n]);
});

test("a reader never finds an event below one that it has read, however transactions overlap", async () => {
  const writers: OpenDatabase[] = [openTestDatabase(database.url), openTestDatabase(database.url)];
  const reading = new AbortController();
  const seen: bigint[] = [];
  const reader = (async () => {
    while (!reading.signal.aborted) {
      for (const { number } of await eventsOf(teamId, seen.at(-1) ?? 0n)) seen.push(number);
    }
    for (const { number } of await eventsOf(teamId, seen.at(-1) ?? 0n)) seen.push(number);
  })();
  const write = async ({ db }: OpenDatabase, rounds: number): Promise<void> => {
    for (let round = 0; round < rounds; round++) {
      // Some alone, some in a transaction that lingers, some that fail.
      if (round % 3 === 0) await insert(db);
      else {
        const failing = db.transaction().execute(async (tx) => {
          await insert(tx);
          await tx.selectNoFrom((eb) => eb.fn<unknown>("pg_sleep", [eb.val(0.004)]).as("slept")).execute();
          if (round % 3 === 2) throw new Error("rolled back");
        });
        if (round % 3 === 2) await assert.rejects(failing, /rolled back/);
        else await failing;
      }
    }
  };
  try {
    await Promise.all(writers.flatMap((writer) => [write(writer, 15), write(writer, 15), write(writer, 15)]));
  } finally {
    reading.abort();
    await reader;
    await Promise.all(writers.map(({ close }) => close()));
  }
  assert.deepEqual(seen, upTo(60));
});

test("hosts of the same teams that go silent at once don't wait for each other", async () => {
  const teams = [teamId, await newTeam(), await newTeam()];
  const hosts = [hostId, await newHost()];
  for (const host of hosts) {
    for (const team of [...teams, ...teams.toReversed()]) await running({ teamId: team, hostId: host });
  }
  const lost = await Promise.all(hosts.map((host) => loseSandboxesOfHost(database.db, host)));
  assert.deepEqual(lost, [6, 6]);
  for (const team of teams) assert.deepEqual(await numbersOf(team), upTo(12));
});

test("a sandbox's events come in pages, the newest first", async () => {
  let row = await running();
  await running();
  for (let round = 0; round < 2; round++) {
    const paused = await moveSandbox(database.db, row, "seenPaused");
    assert.ok(paused);
    row = (await moveSandbox(database.db, paused, "seenRunning")) ?? row;
  }
  const first = await listSandboxEvents(database.db, row.id, { limit: 4 });
  const second = await listSandboxEvents(database.db, row.id, { limit: 4, cursor: first.nextCursor });
  assert.deepEqual(
    [...first.items, ...second.items].map(({ number }) => number),
    [8n, 7n, 6n, 5n, 2n, 1n],
  );
  assert.equal(second.nextCursor, undefined);
  for (const cursor of ["x", "-1", "9".repeat(19)]) {
    await assert.rejects(listSandboxEvents(database.db, row.id, { limit: 4, cursor }), {
      code: "invalid_request",
    });
  }
});

test("old events go, the oldest first and not all at once, and the range says so", async () => {
  const rows = await Promise.all([insert(), insert(), insert()]);
  assert.deepEqual(await rangeOfEvents(database.db, teamId), { oldest: 1n, last: 3n });
  const age = (days: number, numbers: bigint[]) =>
    database.db
      .updateTable("sandbox_events")
      .set({ created_at: new Date(Date.now() - days * 86_400_000) })
      .where("team_id", "=", teamId)
      .where("number", "in", numbers)
      .execute();
  await age(9, [1n]);
  await age(8, [2n]);
  const keepMs = 7 * 86_400_000;
  assert.equal(await dropOldSandboxEvents(database.db, { keepMs, limit: 1 }), 1);
  assert.deepEqual(await numbersOf(teamId), [2n, 3n]);
  assert.equal(await dropOldSandboxEvents(database.db, { keepMs, limit: 10 }), 1);
  assert.equal(await dropOldSandboxEvents(database.db, { keepMs, limit: 10 }), 0);
  assert.deepEqual(await rangeOfEvents(database.db, teamId), { oldest: 3n, last: 3n });
  await age(8, [3n]);
  await dropOldSandboxEvents(database.db, { keepMs, limit: 10 });
  assert.deepEqual(await rangeOfEvents(database.db, teamId), { oldest: 4n, last: 3n });
  assert.equal(rows.length, 3);
});

test("reading, listing and deleting go by an index, never over the whole table", async () => {
  const { pool } = database;
  const client = await pool.connect();
  try {
    await client.query("set enable_seqscan = off");
    for (const [statement, index] of [
      ["select * from sandbox_events where team_id = 't' and number > 5 order by number limit 100", "pkey"],
      [
        "select * from sandbox_events where sandbox_id = 's' and number < 5 order by number desc limit 50",
        "of_sandbox",
      ],
      ["select ctid from sandbox_events where created_at < now() order by created_at limit 9", "by_age"],
    ] as const) {
      const { rows } = await client.query<{ "QUERY PLAN": string }>(`explain ${statement}`);
      const plan = rows.map((row) => row["QUERY PLAN"]).join("\n");
      assert.match(plan, new RegExp(`Index Scan.* using sandbox_events_${index}`));
      assert.doesNotMatch(plan, /Sort/);
    }
  } finally {
    client.release(true);
  }
});

test("news of one replica reaches another's watch, also after its connection broke, and else by the poll", async () => {
  // Another replica; that its connection breaks is what this is about.
  const other = openDatabase({
    url: database.url,
    maxConnections: 2,
    connectTimeoutMs: 5_000,
    statementTimeoutMs: 10_000,
    onError: () => undefined,
  });
  const ending = new AbortController();
  const { news } = other.db;
  const listening = news.listen(systemClock, ending.signal);
  try {
    await expect.poll(() => news.isListening, { timeout: 10_000 }).toBe(true);
    const watch = news.watch(teamId, ending.signal);
    const told = watch.changed;
    await insert();
    await told;

    await database.pool.query(
      "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'rookery-news' and datname = current_database()",
    );
    await expect.poll(() => news.isListening, { timeout: 10_000 }).toBe(false);
    // It wakes when it listens again: nobody knows what was said meanwhile.
    await watch.changed;
    await expect.poll(() => news.isListening, { timeout: 10_000 }).toBe(true);
    const again = watch.changed;
    await insert();
    await again;

    // In a transaction of which nobody told.
    await news.poll();
    const polled = watch.changed;
    await database.db.transaction().execute((tx) => insert(tx));
    await news.poll();
    await polled;
  } finally {
    ending.abort();
    await listening;
    await other.close();
  }
});

test("a watch ends with its signal, and nothing of it stays", async () => {
  const ending = new AbortController();
  const watch = database.db.news.watch(teamId, ending.signal);
  const { changed } = watch;
  ending.abort();
  await changed;
  // Nobody is left to ask for.
  await database.db.news.poll();
  const id: SandboxId = (await insert()).id;
  assert.ok(id);
});
