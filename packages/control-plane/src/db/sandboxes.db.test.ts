import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import * as fc from "fast-check";
import { beforeEach, expect, test } from "vitest";
import type { HostId, SandboxId, TeamId } from "../model/ids.ts";
import { newIds } from "../model/new-ids.ts";
import { NEXT, type SandboxEvent, isFinal, isWork, nextStatus } from "../model/sandbox-state.ts";
import { violatedConstraint } from "./database.ts";
import { insertHost, recordHeartbeat, recordRegistration } from "./hosts.ts";
import {
  type SandboxRecord,
  type SandboxSummaryRecord,
  changeSandbox,
  claimOverdueSandboxes,
  extendDeadline,
  findSandbox,
  findSandboxTarget,
  findSandboxes,
  insertSandbox,
  listSandboxes,
  liveSandboxesOfHost,
  moveSandbox,
} from "./sandboxes.ts";
import { loseSandboxesOfHost } from "./sandboxes-of-host.ts";
import { insertTeam, teamQuota } from "./teams.ts";
import { openTestDatabase, useTestDatabase } from "./testing/test-database.ts";

const database = useTestDatabase();
const ids = newIds(randomBytes);
let teamId: TeamId;
let hostId: HostId;

beforeEach(async () => {
  teamId = ids.team();
  hostId = ids.host();
  await insertTeam(database.db, { id: teamId, name: teamId });
  await insertHost(database.db, { id: hostId, name: "h", type: "shared", labels: {} });
  await recordRegistration(database.db, hostId, {
    address: "127.0.0.1:1",
    publicKey: "AAAA",
    arch: "x86_64",
    cpus: 2,
    memoryMb: 8192,
    diskMb: 50_000,
    drivers: {},
    version: "1",
  });
  const heartbeat = {
    load: { cpus: 0, memoryMbUsed: 0, diskMbFree: 0, sandboxes: 0 },
    digest: "",
    eventLogId: "l",
  };
  await recordHeartbeat(database.db, hostId, { epoch: 1 }, heartbeat);
});

const insert = (input: { deadlineMs?: number; quota?: number; metadata?: Record<string, string> } = {}) =>
  insertSandbox(
    database.db,
    {
      id: ids.sandbox(),
      teamId,
      hostId,
      template: "base",
      vcpus: 1,
      memoryMb: 512,
      diskMb: 4096,
      timeoutSec: 300,
      onTimeout: "pause",
      timeoutMode: "idle",
      env: { A: "b" },
      metadata: input.metadata ?? {},
      deadlineMs: input.deadlineMs ?? 30_000,
    },
    { defaultQuota: input.quota ?? 1_000 },
  );

async function made(input: Parameters<typeof insert>[0] = {}): Promise<SandboxRecord> {
  const row = await insert(input);
  assert.ok(row);
  return row;
}

async function moved(row: SandboxRecord, event: SandboxEvent): Promise<SandboxRecord> {
  const to = nextStatus(row.status, event);
  const after = await moveSandbox(database.db, row, event, {
    ...(to && isWork(to) && { deadlineMs: 30_000 }),
    ...(to === "error" && { error: { code: "internal", message: "x" } }),
  });
  assert.ok(after);
  return after;
}

test("a new sandbox is starting, with generation 1 and a deadline by the database's clock", async () => {
  const row = await made({ metadata: { purpose: "test" } });
  assert.deepEqual([row.status, row.generation, row.commandGeneration], ["starting", 1n, 1n]);
  assert.ok(row.operationDeadline && row.operationDeadline > row.createdAt);
  assert.deepEqual([row.env, row.metadata], [{ A: "b" }, { purpose: "test" }]);
  assert.deepEqual(await findSandbox(database.db, teamId, row.id), row);
  assert.equal(await findSandbox(database.db, ids.team(), row.id), undefined);
});

test("of all who move a row from the same place, one wins", async () => {
  const running = await moved(await made(), "seenRunning");
  const other = openTestDatabase(database.url);
  const events = ["pause", "destroy", "died", "seenPaused", "gone"] as const;
  try {
    const results = await Promise.all(
      events.flatMap((event) =>
        [database.db, other.db].map((db) => {
          const to = nextStatus("running", event);
          return moveSandbox(db, running, event, {
            ...(to && isWork(to) && { deadlineMs: 1_000 }),
            ...(event === "died" && { error: { code: "x", message: "y" } }),
          });
        }),
      ),
    );
    const winners = results.filter((row) => row !== undefined);
    assert.equal(winners.length, 1);
    assert.equal(winners[0]?.generation, running.generation + 1n);
  } finally {
    await other.close();
  }
});

test("a move from an older generation, or from another status, does nothing", async () => {
  const row = await made();
  const running = await moved(row, "seenRunning");
  assert.equal(await moveSandbox(database.db, row, "seenRunning"), undefined);
  assert.equal(
    await moveSandbox(database.db, { ...running, generation: running.generation + 1n }, "gone"),
    undefined,
  );
  assert.deepEqual(await findSandbox(database.db, teamId, row.id), running);
});

test("a move that the state table does not know is a bug, and reaches no database", async () => {
  const row = await made();
  await assert.rejects(moveSandbox(database.db, row, "resume", { deadlineMs: 1 }), /resume means nothing/);
  await assert.rejects(moveSandbox(database.db, row, "destroy"), /needs a deadline/);
});

test("any history keeps the row's invariants and the team's count", async () => {
  await fc.assert(
    fc.asyncProperty(fc.array(fc.nat(1_000), { minLength: 1, maxLength: 12 }), async (choices) => {
      let row = await made();
      for (const choice of choices) {
        const events = Object.keys(NEXT[row.status]) as SandboxEvent[];
        const event = events[choice % Math.max(1, events.length)];
        if (event === undefined) break;
        const before = row;
        if (event === "refused") {
          const pending = await moveSandbox(database.db, row, event, { deadlineMs: 1_000, hostId: null });
          assert.ok(pending);
          row = pending;
        } else if (event === "assign") {
          const starting = await moveSandbox(database.db, row, event, { deadlineMs: 1_000, hostId });
          assert.ok(starting);
          row = starting;
        } else row = await moved(row, event);
        assert.equal(row.generation, before.generation + 1n);
        assert.equal(row.operationDeadline !== undefined, isWork(row.status));
        assert.equal(row.endedAt !== undefined, isFinal(row.status));
        assert.ok(row.commandGeneration <= row.generation);
      }
      const rows = await database.db
        .selectFrom("sandboxes")
        .select("status")
        .where("team_id", "=", teamId)
        .execute();
      const live = rows.filter(({ status }) => !isFinal(status)).length;
      assert.equal((await teamQuota(database.db, teamId))?.live, live);
    }),
    { numRuns: 25 },
  );
});

test("a command's generation stays when its host's word moves the row", async () => {
  const running = await moved(await made(), "seenRunning");
  assert.deepEqual([running.generation, running.commandGeneration], [2n, 1n]);
  const pausing = await moved(running, "pause");
  assert.deepEqual([pausing.generation, pausing.commandGeneration], [3n, 3n]);
  const back = await moveSandbox(database.db, pausing, "seenRunning", { commandGeneration: 1n });
  assert.deepEqual([back?.generation, back?.commandGeneration], [4n, 1n]);
});

test("an error shows until the next move, and a final row keeps it", async () => {
  const running = await moved(await made(), "seenRunning");
  const pausing = await moved(running, "pause");
  const error = { code: "out_of_disk", message: "no room" };
  const back = await moveSandbox(database.db, pausing, "seenRunning", { error });
  assert.deepEqual(back?.error, error);
  assert.ok(back);
  assert.equal((await moved(back, "pause")).error, undefined);
});

test("no row breaks the rules, whoever writes it", async () => {
  const row = await made();
  const breaks = async (set: object) => {
    const update = database.db.updateTable("sandboxes").set(set).where("id", "=", row.id).execute();
    await assert.rejects(update, (cause) => violatedConstraint(cause) !== undefined);
  };
  await breaks({ status: "running" });
  await breaks({ operation_deadline: null });
  await breaks({ status: "stopped", operation_deadline: null });
  await breaks({ host_id: null });
  await breaks({ status: "error", operation_deadline: null, ended_at: new Date() });
  await breaks({ command_generation: 5n });
  await breaks({ status: "asleep" });
  await breaks({ error_code: "x" });
});

test("a quota is exact under concurrency from two replicas", async () => {
  const results = await Promise.all(Array.from({ length: 20 }, () => insert({ quota: 7 })));
  assert.equal(results.filter(Boolean).length, 7);
  assert.deepEqual(await teamQuota(database.db, teamId), { live: 7, max: undefined });
});

test("a host that drains or went silent gets no new sandbox, and costs no quota", async () => {
  await database.db.updateTable("hosts").set({ draining: true }).where("id", "=", hostId).execute();
  assert.equal(await insert(), undefined);
  await database.db
    .updateTable("hosts")
    .set({ draining: false, status: "unreachable" })
    .where("id", "=", hostId)
    .execute();
  assert.equal(await insert(), undefined);
  assert.equal((await teamQuota(database.db, teamId))?.live, 0);
});

test("lists page through everything once, newest first, also where times are equal", async () => {
  const rows = await Promise.all(Array.from({ length: 9 }, () => made()));
  await database.db
    .updateTable("sandboxes")
    .set({ created_at: new Date(1_000) })
    .where(
      "id",
      "in",
      rows.slice(0, 5).map(({ id }) => id),
    )
    .execute();
  const seen: SandboxSummaryRecord[] = [];
  for (let cursor: string | undefined; ;) {
    const page = await listSandboxes(
      database.db,
      teamId,
      { statuses: [], metadata: {} },
      { limit: 2, cursor },
    );
    seen.push(...page.items);
    cursor = page.nextCursor;
    if (cursor === undefined) break;
  }
  assert.equal(new Set(seen.map(({ id }) => id)).size, 9);
  assert.ok(seen.every((row) => !("env" in row)));
  const keys = seen.map(({ createdAt, id }) => [createdAt.getTime(), id] as const);
  assert.deepEqual(
    keys,
    keys.toSorted(([a, x], [b, y]) => b - a || (x < y ? 1 : -1)),
  );
});

test("a cursor that no list made is an invalid_request, whatever it says", async () => {
  const list = (cursor: string) =>
    listSandboxes(database.db, teamId, { statuses: [], metadata: {} }, { limit: 1, cursor });
  await fc.assert(
    fc.asyncProperty(fc.string(), async (text) => {
      await assert.rejects(list(text), { code: "invalid_request" });
      await assert.rejects(list(Buffer.from(text).toString("base64url")), { code: "invalid_request" });
    }),
    { numRuns: 20 },
  );
});

test("lists hide final rows unless asked, and filter by status and by metadata as it is written", async () => {
  const running = await moved(await made({ metadata: { team: "a", stage: "x" } }), "seenRunning");
  const gone = await moved(await moved(await made({ metadata: { team: "a" } }), "seenRunning"), "gone");
  await made({ metadata: { team: "b", "it's": '"odd" \\ %_' } });
  const list = async (filter: Partial<Parameters<typeof listSandboxes>[2]>) => {
    const page = await listSandboxes(
      database.db,
      teamId,
      { statuses: [], metadata: {}, ...filter },
      { limit: 10 },
    );
    return page.items.map(({ id }) => id);
  };
  assert.equal((await list({})).length, 2);
  assert.deepEqual(await list({ statuses: ["stopped"] }), [gone.id]);
  assert.deepEqual(await list({ statuses: ["running", "error"] }), [running.id]);
  assert.deepEqual(await list({ metadata: { team: "a" } }), [running.id]);
  assert.deepEqual(await list({ metadata: { team: "a", stage: "y" } }), []);
  assert.equal((await list({ metadata: { "it's": '"odd" \\ %_' } })).length, 1);
});

test("what is overdue is claimed once, with its generation raised, whichever replicas ask", async () => {
  const overdue = await Promise.all(Array.from({ length: 10 }, () => made({ deadlineMs: -1 })));
  const inTime = await made({ deadlineMs: 60_000 });
  const other = openTestDatabase(database.url);
  try {
    const claims = await Promise.all(
      Array.from({ length: 6 }, (_, index) =>
        claimOverdueSandboxes(index % 2 ? database.db : other.db, { limit: 3, leaseMs: 30_000 }),
      ),
    );
    const claimed = claims.flat();
    const wanted = new Set(overdue.map(({ id }) => id));
    const ours = claimed.filter(({ id }) => wanted.has(id));
    assert.equal(new Set(ours.map(({ id }) => id)).size, ours.length, "none twice");
    assert.ok(ours.length > 0);
    assert.ok(!claimed.some(({ id }) => id === inTime.id), "none that is not overdue");
    for (const row of ours) assert.equal(row.generation, 2n);
    for (const row of overdue.filter(({ id }) => ours.some((each) => each.id === id))) {
      assert.equal(await moveSandbox(database.db, row, "seenRunning"), undefined, "who was at it lost");
    }
  } finally {
    await other.close();
  }
});

test("a lease is extended only for who holds the row", async () => {
  const row = await made();
  assert.ok(await extendDeadline(database.db, row, 60_000));
  const running = await moved(row, "seenRunning");
  assert.equal(await extendDeadline(database.db, row, 60_000), false);
  assert.equal(
    (await findSandbox(database.db, teamId, row.id))?.operationDeadline,
    running.operationDeadline,
  );
});

test("when a host is lost, its running sandboxes are missing and all others stay", async () => {
  const running = await moved(await made(), "seenRunning");
  const paused = await moved(await moved(await made(), "seenRunning"), "seenPaused");
  const starting = await made();
  assert.equal(await loseSandboxesOfHost(database.db, hostId), 1);
  const rows = await findSandboxes(database.db, [running.id, paused.id, starting.id]);
  const status = Object.fromEntries(rows.map((row) => [row.id, row.status]));
  assert.deepEqual(status, { [running.id]: "missing", [paused.id]: "paused", [starting.id]: "starting" });
});

test("a host's live rows come by id, in pages", async () => {
  const rows = await Promise.all(Array.from({ length: 5 }, () => made()));
  await moved(await moved(await made(), "seenRunning"), "gone");
  const first = await liveSandboxesOfHost(database.db, hostId, { after: "", limit: 3 });
  const rest = await liveSandboxesOfHost(database.db, hostId, { after: first.at(-1)?.id ?? "", limit: 3 });
  assert.deepEqual(
    [...first, ...rest].map(({ id }) => id),
    rows.map(({ id }) => id).toSorted(),
  );
});

test("the hot path's query says status and host in one, to its team only", async () => {
  const row = await moved(await made(), "seenRunning");
  const target = await findSandboxTarget(database.db, teamId, row.id);
  assert.deepEqual(
    [target?.status, target?.host?.address, target?.host?.id],
    ["running", "127.0.0.1:1", hostId],
  );
  assert.equal(await findSandboxTarget(database.db, ids.team(), row.id), undefined);
});

test("metadata and lifetime change while a sandbox lives, and not after", async () => {
  const row = await moved(await made({ metadata: { a: "1" } }), "seenRunning");
  const changed = await changeSandbox(database.db, teamId, row.id, { metadata: { b: "2" }, timeoutSec: 10 });
  assert.deepEqual([changed?.metadata, changed?.timeoutSec, changed?.onTimeout], [{ b: "2" }, 10, "pause"]);
  assert.equal(changed?.generation, row.generation);
  await moved(row, "gone");
  assert.equal(await changeSandbox(database.db, teamId, row.id, { timeoutSec: 20 }), undefined);
});

test("the queries that run all the time use their indexes", async () => {
  const explain = async (query: string): Promise<string> => {
    const client = await database.pool.connect();
    try {
      await client.query("begin");
      // Tables are tiny here: the plan is asked for, not the planner's taste.
      await client.query("set local enable_seqscan = off; set local enable_bitmapscan = on");
      const { rows } = await client.query<Record<string, string>>(`explain ${query}`);
      return rows.map((row) => row["QUERY PLAN"]).join("\n");
    } finally {
      await client.query("rollback");
      client.release();
    }
  };
  expect(await explain("select id from sandboxes where operation_deadline < now()")).toContain(
    "sandboxes_overdue",
  );
  expect(
    await explain(
      "select * from sandboxes where team_id = 'x' and status not in ('stopped', 'error') order by created_at desc, id desc limit 5",
    ),
  ).toContain("sandboxes_live");
  expect(
    await explain(
      "select * from sandboxes where host_id = 'x' and status not in ('stopped', 'error') and id > ''",
    ),
  ).toContain("sandboxes_by_host");
  expect(await explain(`select * from sandboxes where metadata @> '{"a":"b"}'`)).toContain(
    "sandboxes_metadata",
  );
});

test("an id that is nobody's is found by no query", async () => {
  const nobody = "sbzzzzzzzzzzzzzzzzzz" as SandboxId;
  assert.equal(await findSandbox(database.db, teamId, nobody), undefined);
  assert.deepEqual(await findSandboxes(database.db, []), []);
});

test("only the beginning of work waits for the disk: what a host said it will say again", async () => {
  const unflushed = async (): Promise<bigint> => {
    const { rows } = await database.pool.query<{ bytes: bigint }>(
      "select (pg_current_wal_insert_lsn() - pg_current_wal_flush_lsn())::bigint as bytes",
    );
    return rows[0]?.bytes ?? 0n;
  };
  let row = await made();
  // Others' commits flush ours along: of many, one that is seen unflushed is enough.
  let isSeen = false;
  for (let round = 0; round < 20 && !isSeen; round++) {
    row = await moved(row, "seenRunning");
    isSeen = (await unflushed()) > 0n;
    row = await moved(row, "pause");
  }
  assert.ok(isSeen);
});
