import assert from "node:assert/strict";
import { setTimeout as sleep } from "node:timers/promises";
import { RookeryError } from "@rookery/protocol/errors";
import { beforeAll, beforeEach, expect, test } from "vitest";
import { claimIdempotencyKey, dropExpiredIdempotencyKeys } from "../db/idempotency.ts";
import { DyingDatabase } from "../db/testing/dying-database.ts";
import { DeadlineSweep } from "../hosts/deadline-sweep.ts";
import { failing, holding } from "../hosts/testing/fake-agent.ts";
import type { SandboxId } from "../model/ids.ts";
import type { Sandbox } from "../model/sandbox.ts";
import { openServices } from "./open-services.ts";
import type {
  Answer,
  Caller,
  Creation,
  HeldKey,
  HostInvitation,
  NewApiKey,
  NewTeam,
  Services,
  Snapshot,
} from "./services.ts";
import { DEFAULTS, type TestHost, type TestPlane, useTestPlane } from "./testing/test-plane.ts";

const LEASE_MS = 2_000;
const openPlane = useTestPlane({ idempotencyLeaseMs: LEASE_MS, idempotencyWaitMs: 60_000 });
let plane: TestPlane;
let host: TestHost;
let caller: Caller;

beforeAll(async () => {
  plane = await openPlane();
  host = await plane.newHost();
});
beforeEach(async () => {
  host.agent.before = () => undefined;
  host.agent.after = () => undefined;
  caller = await plane.newCaller("platform");
});

/** Work of no particular kind. */
const idempotent = (who: Caller, key: string, fingerprint: string, work: () => Promise<Answer>) =>
  plane.services.idempotent(who, key, fingerprint, { make: work, answer: (made) => made });

test("the same key and request work once, however many come at once, and get one answer", async () => {
  let works = 0;
  const work = async () => {
    works++;
    await sleep(50);
    return { status: 201, body: { secret: `made ${works}` } };
  };
  const ask = (fingerprint = "f") => idempotent(caller, "key-1", fingerprint, work);
  const answers = await Promise.all(Array.from({ length: 8 }, () => ask()));
  assert.equal(works, 1);
  assert.deepEqual(
    answers,
    Array.from({ length: 8 }, () => ({ status: 201, body: { secret: "made 1" } })),
  );
  assert.deepEqual(await ask(), answers[0]);
  await assert.rejects(ask("other"), { code: "idempotency_mismatch" });
  const stranger = await plane.newCaller();
  await idempotent(stranger, "key-1", "f", work);
  assert.equal(works, 2, "keys are a team's own");
  const rows = await plane.deps.db.selectFrom("idempotency_keys").selectAll().execute();
  assert.ok(!JSON.stringify(rows).includes(Buffer.from("made 1").toString("hex")));
});

test("work that failed leaves its key free", async () => {
  let tries = 0;
  const work = async () => {
    if (++tries === 1) throw new Error("no luck");
    return { status: 200, body: tries };
  };
  await assert.rejects(idempotent(caller, "k", "f", work), /no luck/);
  assert.deepEqual(await idempotent(caller, "k", "f", work), { status: 200, body: 2 });
});

test("work that is longer than its claim keeps it, and a claim whose replica died is taken over", async () => {
  let works = 0;
  const slow = async () => {
    works++;
    await sleep(2_500);
    return { status: 200, body: works };
  };
  const [one, other] = await Promise.all([
    idempotent(caller, "slow", "f", slow),
    idempotent(caller, "slow", "f", slow),
  ]);
  assert.deepEqual([works, one], [1, other]);

  const dead = { teamId: caller.teamId, key: "dead", fingerprint: "f", claim: "a dead replica" };
  await claimIdempotencyKey(plane.deps.db, dead, { leaseMs: 200, keepMs: 60_000 });
  const taken = await idempotent(caller, "dead", "f", async () => ({
    status: 200,
    body: "again",
  }));
  assert.deepEqual(taken.body, "again");
});

test("an answer is forgotten after its day", async () => {
  const ask = (body: string) => idempotent(caller, "old", body, async () => ({ status: 200, body }));
  await ask("first");
  await plane.deps.db
    .updateTable("idempotency_keys")
    .set({ expires_at: new Date(0) })
    .where("team_id", "=", caller.teamId)
    .execute();
  assert.deepEqual((await ask("second")).body, "second");
  await plane.deps.db
    .updateTable("idempotency_keys")
    .set({ expires_at: new Date(0) })
    .where("team_id", "=", caller.teamId)
    .execute();
  assert.ok((await dropExpiredIdempotencyKeys(plane.deps.db, 100)) >= 1);
});

/** A replica that dies at one of its statements, and does nothing more from then on. */
function dyingReplica(statements: number): { services: Services; database: DyingDatabase } {
  const database = new DyingDatabase(plane.deps.db, statements);
  // Nor does a dead one say anything to its hosts.
  host.agent.before = () => {
    if (database.isDead) throw new Error("the test killed this replica");
  };
  return { services: openServices({ ...plane.deps, db: database.db }), database };
}

type Once = (services: Services, fingerprint?: string) => Promise<Answer>;

function once<Made>(make: (services: Services, held?: HeldKey<Made>) => Promise<Made>): Once {
  return (services, fingerprint = "f") =>
    services.idempotent<Made>(caller, "k", fingerprint, {
      make: (held) => make(services, held),
      answer: (made) => ({ status: 201, body: plain(made) }),
    });
}

const plain = (made: unknown): unknown =>
  JSON.parse(
    JSON.stringify(made, (_key, value: unknown) => (typeof value === "bigint" ? `${value}` : value)),
  );

const createOnce = once<Sandbox>((services, held) => services.createSandbox(caller, DEFAULTS, held));
const snapshotOnce = once<Snapshot>((services, held) =>
  services.createSnapshot(caller, { sandboxId: source, name: "mine", overwrite: false }, held),
);
const sandboxes = async () =>
  (await plane.services.listSandboxes(caller, { statuses: [], metadata: {}, limit: 100 })).items;
const snapshots = () =>
  plane.deps.db
    .selectFrom("snapshots")
    .selectAll()
    .where("team_id", "=", caller.teamId)
    .where("status", "!=", "deleting")
    .execute();
let source: SandboxId;

/** `living`: what there is of it, but for what is over. */
const KINDS: Record<string, { make: Once; living: () => Promise<{ id: string }[]> }> = {
  sandbox: { make: createOnce, living: sandboxes },
  snapshot: { make: snapshotOnce, living: snapshots },
  "API key": {
    make: once<NewApiKey>((services, held) =>
      services.createApiKey(caller, { name: "ci", role: "member" }, held),
    ),
    living: async () => (await plane.services.listApiKeys(caller, { limit: 100 })).items,
  },
  team: {
    make: once<NewTeam>((services, held) =>
      services.createTeam(caller, { name: `of ${caller.teamId}` }, held),
    ),
    living: async () =>
      (await plane.services.listTeams(caller, { limit: 200 })).items.filter(
        ({ name }) => name === `of ${caller.teamId}`,
      ),
  },
  host: {
    make: once<HostInvitation>((services, held) =>
      services.createHost(caller, { name: "h", type: "byoc", labels: {} }, held),
    ),
    living: async () => (await plane.services.listHosts({ ...caller, role: "member" }, { limit: 200 })).items,
  },
};

/** As when the time of a dead replica's claim has passed. */
const expireClaims = () =>
  plane.deps.db
    .updateTable("idempotency_keys")
    .set({ claimed_until: new Date(0) })
    .where("team_id", "=", caller.teamId)
    .execute();

/** The same for its sandboxes' leases; then some replica's sweep comes by. */
async function sweepOverdue(): Promise<void> {
  await plane.deps.db
    .updateTable("sandboxes")
    .set({ operation_deadline: new Date(0) })
    .where("team_id", "=", caller.teamId)
    .where("operation_deadline", "is not", null)
    .execute();
  await new DeadlineSweep(plane.deps, { batch: 50, leaseMs: 30_000, againMs: 0, silentAgainMs: 0 }).round();
}

for (const [name, { make, living }] of Object.entries(KINDS)) {
  test(
    `a ${name} is made once, whichever statement its replica is killed at`,
    { timeout: 120_000 },
    async () => {
      let kills = 0;
      for (; ; kills++) {
        caller = await plane.newCaller("platform");
        if (name === "snapshot") source = (await plane.services.createSandbox(caller, DEFAULTS)).id;
        const { services, database } = dyingReplica(kills);
        const first = await make(services).catch(() => undefined);
        host.agent.before = () => undefined;
        if (!database.isDead) {
          assert.ok(first);
          break;
        }
        assert.ok((await living()).length <= 1, `killed at statement ${kills}`);
        await expireClaims();
        const retries = await Promise.allSettled([
          make(plane.services),
          make(plane.services),
          sweepOverdue(),
        ]);
        // A row that the sweep found to be never made: its error was told, and the key is free for another try.
        for (const retry of retries) {
          if (retry.status === "rejected") assert.equal(codeOf(retry.reason), "host_error");
        }
        const answer = await make(plane.services);
        assert.deepEqual(
          (await living()).map(({ id }) => JSON.stringify(answer.body).includes(`"${id}"`)),
          [true],
          `killed at statement ${kills}`,
        );
        for (const earlier of [first, ...retries.slice(0, 2).map(valueOf)]) {
          if (earlier) assert.deepEqual(earlier, answer);
        }
        await assert.rejects(make(plane.services, "another body"), { code: "idempotency_mismatch" });
      }
      assert.ok(kills >= 4, `${kills} statements`);
    },
  );
}

const codeOf = (cause: unknown) => (cause instanceof RookeryError ? cause.code : String(cause));
const valueOf = (result: PromiseSettledResult<Answer | void>) =>
  result.status === "fulfilled" ? result.value : undefined;

test("a sandbox that still starts when its replica dies is waited for, and there is one VM of it", async () => {
  const hold = holding("createSandbox");
  const { services, database } = dyingReplica(Infinity);
  host.agent.before = hold.hook;
  const first = createOnce(services).catch(() => undefined);
  await hold.arrived;
  database.kill();
  await expireClaims();
  const retry = createOnce(plane.services);
  const [row] = await sandboxes();
  assert.equal(row?.status, "starting");
  hold.release();
  await first;
  // Its host has made it; the row does not know yet, and no replica is at it.
  assert.equal((await sandboxes())[0]?.status, "starting");
  await sweepOverdue();
  const { body } = await retry;
  assert.deepEqual(statusOf(body), [row.id, "running"]);
  assert.deepEqual((await createOnce(plane.services)).body, body);
  assert.equal(host.agent.callsOf("createSandbox").filter(({ id }) => id === row.id).length, 1);
});

/** Makes it, and dies before the answer is stored. */
const makeUnanswered = async (make: Once): Promise<void> => {
  const storesNothing: Services = {
    ...plane.services,
    idempotent: <Made>(who: Caller, key: string, fingerprint: string, creation: Creation<Made>) =>
      plane.services.idempotent<Made>(who, key, fingerprint, {
        make: (held) => creation.make(held),
        answer: () => {
          throw new Error("the test killed this replica");
        },
      }),
  };
  await assert.rejects(make(storesNothing), /the test killed/);
  await expireClaims();
};

test("a sandbox that ran and came to something else since is answered as it is now", async () => {
  await makeUnanswered(createOnce);
  const [made] = await sandboxes();
  assert.ok(made);
  await plane.services.pauseSandbox(caller, made.id);
  const { body } = await createOnce(plane.services);
  assert.deepEqual(statusOf(body), [made.id, "paused"]);

  caller = await plane.newCaller();
  await makeUnanswered(createOnce);
  const [other] = await sandboxes();
  assert.ok(other);
  await plane.services.destroySandbox(caller, other.id);
  assert.deepEqual(statusOf((await createOnce(plane.services)).body), [other.id, "stopped"]);
  assert.deepEqual(await sandboxes(), []);
});

test("a create that failed leaves the key free, also when the replica died before it said so", async () => {
  host.agent.after = failing("createSandbox", "guest_error");
  await assert.rejects(createOnce(plane.services), { code: "guest_error" });
  host.agent.after = () => undefined;
  assert.deepEqual(statusOf((await createOnce(plane.services)).body)[1], "running");

  caller = await plane.newCaller();
  await makeUnanswered(createOnce);
  const [row] = await sandboxes();
  assert.ok(row);
  await plane.deps.db
    .updateTable("sandboxes")
    .set({
      status: "error",
      started_at: null,
      error_code: "out_of_disk",
      error_message: "It is full.",
      ended_at: new Date(),
    })
    .where("id", "=", row.id)
    .execute();
  await assert.rejects(createOnce(plane.services), { code: "out_of_disk", message: "It is full." });
  const [id] = statusOf((await createOnce(plane.services)).body);
  assert.notEqual(id, row.id);
});

test("a replica that was too slow makes nothing, and answers what the one after it made", async () => {
  const gate = Promise.withResolvers<void>();
  const arrived = Promise.withResolvers<void>();
  const slow = once<Sandbox>(async (services, held) => {
    arrived.resolve();
    await gate.promise;
    return services.createSandbox(caller, DEFAULTS, held);
  })(plane.services);
  await arrived.promise;
  await expireClaims();
  const answer = await createOnce(plane.services);
  gate.resolve();
  assert.deepEqual(await slow, answer);
  assert.equal((await sandboxes()).length, 1);
});

test("a snapshot that the replica after it goes on with is not deleted by the one before", async () => {
  source = (await plane.services.createSandbox(caller, DEFAULTS)).id;
  const hold = holding("createSnapshot");
  host.agent.before = hold.hook;
  const first = snapshotOnce(plane.services);
  await hold.arrived;
  await expireClaims();
  const second = snapshotOnce(plane.services);
  await expect.poll(() => host.agent.callsOf("createSnapshot").length).toBeGreaterThan(1);
  hold.release();
  assert.deepEqual(await first, await second);
  const made = await snapshots();
  assert.equal(made.length, 1);
  assert.ok(host.agent.snapshots.has(made[0]?.id ?? ""));
});

const statusOf = (body: unknown) => {
  // oxlint-disable-next-line typescript/no-unsafe-type-assertion -- a sandbox's answer of these tests
  const { id, status } = body as { id: string; status: string };
  return [id, status];
};
