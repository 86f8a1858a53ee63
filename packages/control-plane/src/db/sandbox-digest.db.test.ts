/** The digest of a host's rows, which follows every change of theirs. */
import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import { digestOfSandboxes } from "@rookery/protocol/sandbox-digest";
import * as fc from "fast-check";
import { sql } from "kysely";
import { beforeAll, beforeEach, test } from "vitest";
import { SANDBOX_DIGEST_VECTORS } from "../../../protocol/src/testing/sandbox-digest-vectors.ts";
import type { HostId, SandboxId, TeamId } from "../model/ids.ts";
import { newIds } from "../model/new-ids.ts";
import { NEXT, type SandboxEvent, isFinal, isWork, nextStatus } from "../model/sandbox-state.ts";
import type { SandboxStatus } from "../model/sandbox.ts";
import { claimDueHosts, findHost, insertHost, recordHeartbeat, recordRegistration } from "./hosts.ts";
import { loseSandboxesOfHost, stopSandboxesOfHost } from "./sandboxes-of-host.ts";
import {
  claimOverdueSandboxes,
  findSandboxes,
  insertSandbox,
  liveSandboxesOfHost,
  moveSandbox,
} from "./sandboxes.ts";
import { insertTeam } from "./teams.ts";
import { openTestDatabase, useTestDatabase } from "./testing/test-database.ts";

const database = useTestDatabase();
const ids = newIds(randomBytes);
let teamId: TeamId;
let hosts: HostId[];

beforeAll(async () => {
  teamId = ids.team();
  await insertTeam(database.db, { id: teamId, name: teamId });
});
beforeEach(async () => {
  hosts = [await newHost(), await newHost()];
});

async function newHost(): Promise<HostId> {
  const id = ids.host();
  await insertHost(database.db, { id, name: "h", type: "shared", labels: {} });
  await recordRegistration(database.db, id, {
    ...{ address: "127.0.0.1:1", publicKey: "AAAA", arch: "x86_64", cpus: 2, memoryMb: 8192, diskMb: 50_000 },
    ...{ drivers: {}, version: "1" },
  });
  await beat(id, "x");
  return id;
}

const beat = (id: HostId, digest: string) =>
  recordHeartbeat(
    database.db,
    id,
    { epoch: 1 },
    {
      ...{ load: { cpus: 0, memoryMbUsed: 0, diskMbFree: 0, sandboxes: 0 }, digest, eventLogId: "l" },
    },
  );
/** Whether a host that says this agrees with its rows. */
async function agrees(id: HostId, digest: string): Promise<boolean> {
  await beat(id, digest);
  const row = await database.db
    .selectFrom("hosts")
    .select("digest_differs")
    .where("id", "=", id)
    .executeTakeFirstOrThrow();
  return !row.digest_differs;
}
async function digestOfRows(id: HostId): Promise<string> {
  const rows = await liveSandboxesOfHost(database.db, id, { after: "", limit: 10_000 });
  return digestOfSandboxes(rows.map((row) => ({ ...row, generation: row.commandGeneration })));
}
const insert = (hostId: HostId, db = database.db) =>
  insertSandbox(
    db,
    {
      ...{ id: ids.sandbox(), teamId, hostId, template: "base", vcpus: 1, memoryMb: 512, diskMb: 4096 },
      ...{ timeoutSec: 0, onTimeout: "pause", timeoutMode: "idle", env: {}, metadata: {}, deadlineMs: -1 },
    },
    { defaultQuota: 1_000_000 },
  );

test.each(
  SANDBOX_DIGEST_VECTORS.filter(({ name }) => !name.includes("work")).map((v) => [v.name, v] as const),
)("the shared vector: %s", async (_name, { sandboxes, digest }) => {
  const [hostId] = hosts;
  assert.ok(hostId);
  for (const { id, status, generation } of sandboxes) {
    await database.db
      .deleteFrom("sandboxes")
      .where("id", "=", id as SandboxId)
      .execute();
    await database.db
      .insertInto("sandboxes")
      .values({
        ...{ id: id as SandboxId, team_id: teamId, status: status as SandboxStatus, host_id: hostId },
        ...{
          generation,
          command_generation: generation,
          template: "base",
          vcpus: 1,
          memory_mb: 1,
          disk_mb: 1,
        },
        ...{ timeout_sec: 0, on_timeout: "pause", timeout_mode: "idle", env: "{}", metadata: "{}" },
      })
      .execute();
  }
  assert.ok(await agrees(hostId, digest));
  assert.ok(!(await agrees(hostId, `${digest.slice(0, -1)}${digest.endsWith("0") ? "1" : "0"}`)));
  for (const { id } of sandboxes)
    await database.db
      .deleteFrom("sandboxes")
      .where("id", "=", id as SandboxId)
      .execute();
  assert.ok(await agrees(hostId, "x1:0000000000000000"), "what is deleted is gone from it");
});

test("after any history, of one row or of a whole host, the digest is that of the rows", async () => {
  const anyStep = fc.tuple(fc.nat(3), fc.nat(20), fc.nat(1));
  await fc.assert(
    fc.asyncProperty(fc.array(anyStep, { maxLength: 30 }), async (steps) => {
      hosts = [await newHost(), await newHost()];
      const made: SandboxId[] = [];
      for (const [kind, pick, which] of steps) {
        const hostId = hosts[which];
        assert.ok(hostId);
        if (kind === 0 || made.length === 0) {
          const row = await insert(hostId);
          if (row) made.push(row.id);
        } else if (kind === 3 && pick === 0) await loseSandboxesOfHost(database.db, hostId);
        else if (kind === 3 && pick === 1)
          await database.db.transaction().execute((tx) => stopSandboxesOfHost(tx, hostId));
        else if (kind === 3 && pick === 2)
          await claimOverdueSandboxes(database.db, { limit: 3, leaseMs: -1 });
        else await step(made[pick % made.length], hostId, pick);
      }
      for (const id of hosts) assert.ok(await agrees(id, await digestOfRows(id)));
    }),
    { numRuns: 25 },
  );
});

async function step(id: SandboxId | undefined, hostId: HostId, pick: number): Promise<void> {
  const [row] = id ? await findSandboxes(database.db, [id]) : [];
  const events = row ? (Object.keys(NEXT[row.status]) as SandboxEvent[]) : [];
  const event = events[pick % events.length];
  const to = row && event && nextStatus(row.status, event);
  if (!row || !event || !to) return;
  await moveSandbox(database.db, row, event, {
    ...(isWork(to) && { deadlineMs: -1 }),
    ...(to === "error" && { error: { code: "internal", message: "x" } }),
    ...(event === "assign" && { hostId }),
    ...(event === "refused" && { hostId: null }),
    ...(!isWork(to) && !isFinal(to) && { commandGeneration: row.generation }),
  });
}

test("changes at the same time, from two replicas, all count", async () => {
  const [hostId] = hosts;
  assert.ok(hostId);
  const replica = openTestDatabase(database.url);
  try {
    await Promise.all(
      Array.from({ length: 30 }, async (_, i) => {
        const { db } = i % 2 === 0 ? database : replica;
        const row = await insert(hostId, db);
        const running = row && (await moveSandbox(db, row, "seenRunning"));
        if (i % 3 === 0 && running) await moveSandbox(db, running, "seenPaused");
        if (i % 3 === 1 && running) await moveSandbox(db, running, "gone");
      }),
    );
  } finally {
    await replica.close();
  }
  assert.ok(await agrees(hostId, await digestOfRows(hostId)));
});

test("what is taken back leaves the digest as it was", async () => {
  const [hostId] = hosts;
  assert.ok(hostId);
  const row = await insert(hostId);
  assert.ok(row && (await moveSandbox(database.db, row, "seenRunning")));
  const before = await digestOfRows(hostId);
  await assert.rejects(
    database.db.transaction().execute(async (tx) => {
      await loseSandboxesOfHost(tx, hostId);
      await stopSandboxesOfHost(tx, hostId);
      throw new Error("never mind");
    }),
  );
  assert.ok(await agrees(hostId, before));
});

test("a digest of another definition never agrees, and neither does a host whose rows are missing", async () => {
  const [hostId] = hosts;
  assert.ok(hostId);
  for (const digest of ["", "0000000000000000", "X1:0000000000000000", "e3b0c44298fc1c149afbf4c8996fb924"])
    assert.ok(!(await agrees(hostId, digest)));
  assert.ok(await agrees(hostId, "x1:0000000000000000"));
  const row = await insert(hostId);
  assert.ok(row && (await moveSandbox(database.db, row, "seenRunning")));
  await loseSandboxesOfHost(database.db, hostId);
  for (const sandboxes of [[], [{ id: row.id, status: "running", generation: row.commandGeneration }]])
    assert.ok(!(await agrees(hostId, digestOfSandboxes(sandboxes))));
});

test("a host is to be compared when it differs, was not heard, or was not for long; else its row is all", async () => {
  const [hostId] = hosts;
  assert.ok(hostId);
  const set = (values: object) =>
    database.db
      .updateTable("hosts")
      .set({ next_check_at: new Date(0), ...values })
      .where("id", "=", hostId)
      .execute();
  const why = async () => {
    const due = await claimDueHosts(database.db, {
      ...{ limit: 1_000, everyMs: 60_000, unheardMs: 45_000, compareEveryMs: 600_000 },
    });
    return due.find(({ id }) => id === hostId)?.compare ?? "not";
  };
  const compared_at = new Date();
  await beat(hostId, "x1:0000000000000000");
  await set({ compared_at });
  assert.equal(await why(), "not");
  await set({ compared_at: new Date(Date.now() - 601_000) });
  assert.equal(await why(), "due");
  await set({ compared_at, last_heartbeat_at: new Date(Date.now() - 46_000) });
  assert.equal(await why(), "unheard");
  await beat(hostId, "x1:0000000000000001");
  await set({});
  assert.equal(await why(), "differs");
  await set({ status: "unreachable" });
  await beat(hostId, "x1:0000000000000000");
  assert.equal(await why(), "due", "one that returns is looked at whole");
  assert.equal((await findHost(database.db, "all", hostId))?.status, "online");
});

test("no heartbeat and no check reads a sandbox", async () => {
  const read = async () => {
    // Flushed by the end of a transaction on the same connection.
    const { rows } = await sql<{ reads: bigint }>`
      select seq_scan + idx_scan as reads from pg_stat_xact_user_tables where relname = 'sandboxes'`.execute(
      tx,
    );
    return rows[0]?.reads;
  };
  const [hostId] = hosts;
  assert.ok(hostId);
  let tx = database.db as Parameters<typeof insertHost>[0];
  await database.db.transaction().execute(async (inner) => {
    tx = inner;
    const before = await read();
    await recordHeartbeat(
      inner,
      hostId,
      { epoch: 1 },
      {
        ...{ load: { cpus: 0, memoryMbUsed: 0, diskMbFree: 0, sandboxes: 0 }, digest: "x", eventLogId: "l" },
      },
    );
    await claimDueHosts(inner, { limit: 1_000, everyMs: 0, unheardMs: 1, compareEveryMs: 1 });
    assert.equal(await read(), before);
    await liveSandboxesOfHost(inner, hostId, { after: "", limit: 1 });
    assert.notEqual(await read(), before, "the measure itself works");
  });
});
