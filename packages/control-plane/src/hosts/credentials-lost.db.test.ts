/**
 * What an agent has after answers were lost and time has passed: by the control
 * plane's clock, which is a parameter, and the database's, for which rows are
 * made older. And what a thief has.
 */
import assert from "node:assert/strict";
import { createHash, generateKeyPairSync, randomBytes } from "node:crypto";
import { RookeryError } from "@rookery/protocol/errors";
import { sql } from "kysely";
import { SignJWT } from "jose";
import { afterAll, beforeAll, beforeEach, test } from "vitest";
import type { Database } from "../db/database.ts";
import type { HostId } from "../model/ids.ts";
import type { Caller } from "../service/services.ts";
import { LOAD, type TestPlane, factsOf, useTestPlane } from "../service/testing/test-plane.ts";
import { HostCredentials } from "./credentials.ts";
import { CREDENTIAL_FAILPOINTS } from "./failpoints.ts";
import { FakeAgent } from "./testing/fake-agent.ts";

const DAY_MS = 86_400_000;
const OPTIONS = { registrationMs: 3_600_000, accessMs: 7 * DAY_MS, refreshMs: 60 * DAY_MS };
const HEARTBEAT = { load: LOAD, digest: "d", eventLogId: "log-1" };

const openPlane = useTestPlane();
let plane: TestPlane;
let operator: Caller;
const agent = await new FakeAgent().listen();
afterAll(() => agent.close());
/** Days that have passed since the beginning. */
let day = 0;
const reached = new Set<string>();

beforeAll(async () => {
  plane = await openPlane();
  operator = await plane.newCaller("platform");
});
beforeEach(() => {
  day = 0;
});

/** A replica; all of them have the same clock. With `diesAt`, one that ends at this failpoint. */
function replica(db: Database = plane.deps.db, diesAt?: string): HostCredentials {
  const now = (): number => Date.now() + day * DAY_MS;
  const reach = (name: string): void => {
    reached.add(name);
    // To the database a program that ends and a transaction that fails are the same.
    if (name === diesAt) throw new Error(`died at ${name}`);
  };
  const { cluster } = plane.deps;
  return new HostCredentials({ db, cluster, random: randomBytes, now, options: OPTIONS, reach });
}

/** Time passes, by every clock. */
async function pass(days: number): Promise<void> {
  day += days;
  const older = sql<Date>`expires_at - ${days} * interval '1 day'`;
  await plane.deps.db.updateTable("host_refresh_tokens").set({ expires_at: older }).execute();
  await plane.deps.db.updateTable("host_registration_tokens").set({ expires_at: older }).execute();
}

interface Invited {
  id: HostId;
  token: string;
}
const invite = async (): Promise<Invited> => {
  const { host, registrationToken: token } = await plane.services.createHost(operator, {
    name: "h",
    type: "shared",
    labels: {},
  });
  return { id: host.id, token };
};

/** What an agent registers with, as the agent's register.ts makes it. */
async function newKey() {
  const { publicKey, privateKey } = generateKeyPairSync("ed25519");
  const spki = publicKey.export({ format: "der", type: "spki" }).toString("base64");
  const proof = (token: string, claims: object = {}): Promise<string> =>
    new SignJWT({ purpose: "register", token: createHash("sha256").update(token).digest("hex"), ...claims })
      .setProtectedHeader({ alg: "EdDSA" })
      .setAudience("rookery-control-plane")
      .sign(privateKey);
  return { spki, proof };
}
type Key = Awaited<ReturnType<typeof newKey>>;

const register = async (token: string, key: Key, proof?: string, at = replica()) =>
  at.register(token, { ...factsOf(agent, token), publicKey: key.spki }, proof ?? (await key.proof(token)));
const registered = async () => {
  const { id, token } = await invite();
  return { id, ...(await register(token, await newKey())) };
};
const beat = (id: HostId, accessToken: string) => replica().heartbeat(accessToken, id, HEARTBEAT);
const refused = async (work: Promise<unknown>): Promise<void> => {
  await assert.rejects(work, (cause) => cause instanceof RookeryError && cause.code === "invalid_token");
};

test("an agent whose registration answer was lost gets another, however late, and the lost one is good for nothing", async () => {
  const { id, token } = await invite();
  const key = await newKey();
  const lost = await register(token, key);
  await pass(70);
  const lostToo = await register(token, key);
  const kept = await register(token, key);
  assert.equal(kept.hostId, id);
  for (const { accessToken, refreshToken } of [lost, lostToo]) {
    await refused(beat(id, accessToken));
    await refused(replica().refresh(refreshToken));
  }
  await beat(id, kept.accessToken);
});

test("a spent token is good for its own key alone, and for that until the answer is used", async () => {
  const { id, token } = await invite();
  const [key, other] = [await newKey(), await newKey()];
  await register(token, key);
  await refused(register(token, other));
  await refused(register(token, key, await other.proof(token)));
  await refused(register(token, key, await key.proof(`${token}1`)));
  await refused(register(token, key, await key.proof(token, { purpose: "end-host" })));
  await refused(register(token, key, "no.proof.atall"));
  await refused(replica().register(token, { ...factsOf(agent, token), publicKey: key.spki }));
  const { accessToken, refreshToken } = await register(token, key);
  await beat(id, accessToken);
  await refused(register(token, key));
  await replica().refresh(refreshToken);
  await refused(register(token, key));
});

test("a refresh uses the answer of a registration too; a new token, a revocation and a theft end the old one", async () => {
  const spent = async () => {
    const invited = await invite();
    const key = await newKey();
    return { ...invited, key, ...(await register(invited.token, key)) };
  };
  const refreshed = await spent();
  await replica().refresh(refreshed.refreshToken);
  await refused(register(refreshed.token, refreshed.key));

  const renewed = await spent();
  const { registrationToken } = await plane.services.newRegistrationToken(operator, renewed.id);
  await refused(register(renewed.token, renewed.key));
  await register(registrationToken, renewed.key);

  const revoked = await spent();
  await plane.services.revokeHost(operator, revoked.id);
  await refused(register(revoked.token, revoked.key));

  const robbed = await spent();
  const next = await replica().refresh(robbed.refreshToken);
  await beat(robbed.id, next.accessToken);
  await refused(replica().refresh(robbed.refreshToken));
  await refused(register(robbed.token, robbed.key));
});

test("two agents with one token, at two replicas at the same time: one is registered", async () => {
  const another = plane.openAnother();
  try {
    for (let round = 0; round < 8; round += 1) {
      const { id, token } = await invite();
      const keys = await Promise.all(Array.from({ length: 6 }, newKey));
      const replicas = [replica(), replica(another.db)];
      const results = await Promise.allSettled(
        keys.map((key, index) => register(token, key, undefined, replicas[index % 2])),
      );
      const won = results.flatMap((result) => (result.status === "fulfilled" ? [result.value] : []));
      assert.equal(won.length, 1);
      for (const result of results) {
        if (result.status === "rejected") await refused(Promise.reject(result.reason as Error));
      }
      // The losers can't become it either, and the winner can ask again.
      const winner = results.findIndex(({ status }) => status === "fulfilled");
      const losers = keys.filter((_, index) => index !== winner);
      await Promise.all(losers.map((key) => refused(register(token, key))));
      const again = await register(token, keys[winner]!);
      await beat(id, again.accessToken);
    }
  } finally {
    await another.close();
  }
});

test("a stolen refresh token that is shown after its owner went on never works, and ends the family", async () => {
  for (const owner of ["heartbeat", "refresh"] as const) {
    const host = await registered();
    const next = await replica().refresh(host.refreshToken);
    const used =
      owner === "heartbeat"
        ? await beat(host.id, next.accessToken).then(() => next)
        : await replica().refresh(next.refreshToken);
    await refused(replica().refresh(host.refreshToken));
    await refused(replica().refresh(used.refreshToken));
    await refused(beat(host.id, used.accessToken));
  }
});

test("a stolen answer that is used first is found out when the owner goes on", async () => {
  const host = await registered();
  const stolen = await replica().refresh(host.refreshToken);
  const own = await replica().refresh(host.refreshToken);
  await beat(host.id, stolen.accessToken);
  await refused(replica().refresh(own.refreshToken));
  await refused(beat(host.id, stolen.accessToken));
});

test("an access token that came with a refresh token uses that one and no other", async () => {
  const [one, other] = [await registered(), await registered()];
  await beat(one.id, one.accessToken);
  const used = async (id: HostId): Promise<number> =>
    (
      await plane.deps.db
        .selectFrom("host_refresh_tokens")
        .select("used_at")
        .where("host_id", "=", id)
        .where("used_at", "is not", null)
        .execute()
    ).length;
  assert.deepEqual([await used(one.id), await used(other.id)], [1, 0]);
});

test("whichever line of an exchange is a replica's last, the agent gets in by what it has", async () => {
  const names = CREDENTIAL_FAILPOINTS.filter((name) => !/^reseal\.|\.answer\./.test(name));
  const dying = (name: string) => replica(plane.deps.db, name);
  const died = (name: string, work: Promise<unknown>) => assert.rejects(work, { message: `died at ${name}` });
  for (const name of names) {
    const { id, token } = await invite();
    const key = await newKey();
    if (name.startsWith("register-host.")) await died(name, register(token, key, undefined, dying(name)));
    // An unspent one ends after its hour: its host was never in.
    if (name === "register-host.commit.after") await pass(50);
    const first = await register(token, key);
    if (name.startsWith("heartbeat-host."))
      await died(name, dying(name).heartbeat(first.accessToken, id, HEARTBEAT));
    if (name.startsWith("refresh-host.")) await died(name, dying(name).refresh(first.refreshToken));
    await pass(50);
    const next = await replica().refresh(first.refreshToken);
    await beat(id, next.accessToken);
    if (!name.startsWith("end-family.")) continue;
    await died(name, dying(name).refresh(first.refreshToken));
    await refused(replica().refresh(first.refreshToken));
    await refused(replica().refresh(next.refreshToken));
    await refused(beat(id, next.accessToken));
  }
  assert.deepEqual(
    names.filter((name) => !reached.has(name)),
    [],
  );
});

test("a host that was down for more than 7 days gets in by its refresh token, and is heard at once", async () => {
  const host = await registered();
  await beat(host.id, host.accessToken);
  await pass(8);
  await refused(beat(host.id, host.accessToken));
  const { accessToken } = await replica().refresh(host.refreshToken);
  await beat(host.id, accessToken);
});

test("the 60 days begin anew with each exchange, also with one whose answer was lost", async () => {
  const host = await registered();
  for (let time = 0; time < 3; time += 1) {
    await pass(59);
    await replica().refresh(host.refreshToken);
  }
  const { accessToken } = await replica().refresh(host.refreshToken);
  await beat(host.id, accessToken);
});

test("after more than 60 days a host is refused with invalid_token, and an operator can let it in again", async () => {
  const host = await registered();
  await beat(host.id, host.accessToken);
  await pass(61);
  await refused(replica().refresh(host.refreshToken));
  // Its monitor has long said that it is silent.
  await plane.deps.db.updateTable("hosts").set({ status: "unreachable" }).where("id", "=", host.id).execute();
  const { registrationToken } = await plane.services.newRegistrationToken(operator, host.id);
  const again = await register(registrationToken, await newKey());
  assert.equal(again.hostId, host.id);
  await beat(host.id, again.accessToken);
});
