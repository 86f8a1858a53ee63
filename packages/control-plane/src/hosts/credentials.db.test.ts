import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import { RookeryError } from "@rookery/protocol/errors";
import * as fc from "fast-check";
import { SignJWT, UnsecuredJWT, decodeJwt } from "jose";
import { afterAll, beforeAll, test } from "vitest";
import type { Caller } from "../service/services.ts";
import { LOAD, type TestPlane, factsOf, registerAgent, useTestPlane } from "../service/testing/test-plane.ts";
import { signHostAccess } from "./tokens.ts";
import { FakeAgent } from "./testing/fake-agent.ts";

const openPlane = useTestPlane();
let plane: TestPlane;
let operator: Caller;
/** Only its address is needed. */
const agent = await new FakeAgent().listen();
afterAll(() => agent.close());

beforeAll(async () => {
  plane = await openPlane();
  operator = await plane.newCaller("platform");
});

const register = () => registerAgent(plane.services, operator, agent);
const invite = () => plane.services.createHost(operator, { name: "h", type: "shared", labels: {} });
const beat = (host: { id: Awaited<ReturnType<typeof register>>["id"]; accessToken: string }) =>
  plane.services.heartbeat(host.accessToken, host.id, {
    load: LOAD,
    digest: "d",
    eventLogId: "log-1",
    lastEventNumber: 0n,
  });
const refused = async (work: Promise<unknown>): Promise<void> => {
  await assert.rejects(work, (cause) => cause instanceof RookeryError && cause.code === "invalid_token");
};

test("a host registers once: its token is consumed, and what it gets works", async () => {
  const { host, registrationToken } = await invite();
  assert.equal(host.status, "pending");
  const registered = await plane.services.registerHost(factsOf(agent, registrationToken));
  assert.equal(registered.hostId, host.id);
  assert.equal(registered.clusterId, plane.deps.cluster.id);
  const status = async () => (await plane.services.getHost(operator, host.id)).status;
  assert.equal(await status(), "unreachable", "it may not have our answer yet");
  await beat({ id: host.id, accessToken: registered.accessToken });
  assert.equal(await status(), "online");
  await refused(plane.services.registerHost(factsOf(agent, registrationToken)));
});

test("of registrations with one token at the same time, one succeeds", async () => {
  const { registrationToken } = await invite();
  const results = await Promise.allSettled(
    Array.from({ length: 8 }, () => plane.services.registerHost(factsOf(agent, registrationToken))),
  );
  assert.equal(results.filter(({ status }) => status === "fulfilled").length, 1);
});

test("a registration that fails in the middle leaves the token good", async () => {
  const { registrationToken } = await invite();
  // The column is an integer: the update fails after the token was consumed.
  const broken = { ...factsOf(agent, registrationToken), cpus: 1e12 };
  await assert.rejects(plane.services.registerHost(broken));
  await plane.services.registerHost(factsOf(agent, registrationToken));
});

test("a new registration token replaces the one before, and an expired one is no token", async () => {
  const { host, registrationToken } = await invite();
  const renewed = await plane.services.newRegistrationToken(operator, host.id);
  await refused(plane.services.registerHost(factsOf(agent, registrationToken)));
  await plane.deps.db
    .updateTable("host_registration_tokens")
    .set({ expires_at: new Date(0) })
    .where("host_id", "=", host.id)
    .execute();
  await refused(plane.services.registerHost(factsOf(agent, renewed.registrationToken)));
});

test("a registered host gets no new token, until it has gone silent", async () => {
  const { id } = await register();
  const renew = () => plane.services.newRegistrationToken(operator, id);
  await assert.rejects(renew(), { code: "wrong_state" });
  await plane.deps.db.updateTable("hosts").set({ status: "unreachable" }).where("id", "=", id).execute();
  const { registrationToken } = await renew();
  await plane.services.registerHost(factsOf(agent, registrationToken));
  await renew();
});

test("registering anew cuts off what the host had before", async () => {
  const before = await register();
  await plane.deps.db
    .updateTable("hosts")
    .set({ status: "unreachable" })
    .where("id", "=", before.id)
    .execute();
  const { registrationToken } = await plane.services.newRegistrationToken(operator, before.id);
  const after = await plane.services.registerHost(factsOf(agent, registrationToken));
  await refused(beat(before));
  await refused(plane.services.refreshHostTokens(before.refreshToken));
  await beat({ id: before.id, accessToken: after.accessToken });
});

test("no secret of a host lies in the database as it is", async () => {
  const { registrationToken } = await invite();
  const { refreshToken } = await register();
  const dump = JSON.stringify([
    await plane.deps.db.selectFrom("host_registration_tokens").selectAll().execute(),
    await plane.deps.db.selectFrom("host_refresh_tokens").selectAll().execute(),
    await plane.deps.db.selectFrom("cluster").selectAll().execute(),
  ]);
  const key = plane.deps.cluster.signingKey.export({ format: "der", type: "pkcs8" });
  for (const secret of [registrationToken.split("_")[1], refreshToken.split("_")[1], key.toString("hex")]) {
    assert.ok(secret && !dump.includes(secret));
  }
});

test("an access token is good for its host and its epoch only, and no other token passes for one", async () => {
  const [one, other] = [await register(), await register()];
  const { signingKey } = plane.deps.cluster;
  await assert.rejects(beat({ id: other.id, accessToken: one.accessToken }), { code: "forbidden" });
  const claims = decodeJwt(one.accessToken);
  const forge = (change: object, alg = "EdDSA", key: Parameters<SignJWT["sign"]>[0] = signingKey) =>
    new SignJWT({ ...claims, ...change }).setProtectedHeader({ alg }).sign(key);
  for (const accessToken of [
    "",
    "a.b.c",
    `${one.accessToken.slice(0, -4)}AAAA`,
    new UnsecuredJWT({ ...claims }).encode(),
    await forge({}, "HS256", Buffer.from(plane.deps.cluster.publicKey, "base64")),
    await forge({ aud: one.id }),
    await forge({ iss: "somebody" }),
    await forge({ exp: Math.floor(Date.now() / 1000) - 120 }),
    await forge({ exp: undefined }),
    await forge({ epoch: "1" }),
    await signHostAccess(
      plane.deps.cluster,
      { id: one.id, epoch: 2 },
      { validMs: 60_000, nowMs: Date.now() },
    ),
  ]) {
    await refused(beat({ id: one.id, accessToken }));
  }
  await assert.rejects(beat({ id: one.id, accessToken: await forge({ sub: other.id }) }), {
    code: "forbidden",
  });
  await beat(one);
});

test("a refresh gives tokens that work, and the old one stays good until the new one was shown", async () => {
  const host = await register();
  const lost = await plane.services.refreshHostTokens(host.refreshToken);
  // The answer was lost, twice: the same token is shown again.
  const lostToo = await plane.services.refreshHostTokens(host.refreshToken);
  const kept = await plane.services.refreshHostTokens(host.refreshToken);
  assert.equal(new Set([lost, lostToo, kept].map(({ refreshToken }) => refreshToken)).size, 3);
  const next = await plane.services.refreshHostTokens(kept.refreshToken);
  await beat({ id: host.id, accessToken: next.accessToken });
});

test("a refresh token that is shown after its successor was is theft: all the host's tokens end", async () => {
  const host = await register();
  const second = await plane.services.refreshHostTokens(host.refreshToken);
  const third = await plane.services.refreshHostTokens(second.refreshToken);
  await refused(plane.services.refreshHostTokens(host.refreshToken));
  await refused(plane.services.refreshHostTokens(third.refreshToken));
  await refused(beat({ id: host.id, accessToken: third.accessToken }));
});

test("a stolen sibling that is used first ends the family when the host's own is shown", async () => {
  const host = await register();
  const stolen = await plane.services.refreshHostTokens(host.refreshToken);
  const own = await plane.services.refreshHostTokens(host.refreshToken);
  const loot = await plane.services.refreshHostTokens(stolen.refreshToken);
  await refused(plane.services.refreshHostTokens(own.refreshToken));
  await refused(plane.services.refreshHostTokens(loot.refreshToken));
  await refused(beat({ id: host.id, accessToken: loot.accessToken }));
});

test("however often answers are lost and on whichever side it crashes, a host is never locked out", async () => {
  const { services } = plane;
  await fc.assert(
    fc.asyncProperty(
      fc.array(fc.constantFrom("crash before asking", "answer lost", "crash before storing", "stored"), {
        maxLength: 14,
      }),
      async (course) => {
        const host = await register();
        // What lies on the host's disk: the only thing that it has after a crash.
        let onDisk = host.refreshToken;
        for (const step of course) {
          if (step === "crash before asking") continue;
          const answer = await services.refreshHostTokens(onDisk);
          if (step === "stored") onDisk = answer.refreshToken;
        }
        const { accessToken } = await services.refreshHostTokens(onDisk);
        await beat({ id: host.id, accessToken });
      },
    ),
    { numRuns: 15 },
  );
});

test("a refresh that dies before its commit changes nothing", async () => {
  const host = await register();
  const { db } = plane.deps;
  await db.schema.alterTable("host_refresh_tokens").renameTo("away").execute();
  await assert.rejects(plane.services.refreshHostTokens(host.refreshToken));
  await db.schema.alterTable("away").renameTo("host_refresh_tokens").execute();
  await plane.services.refreshHostTokens(host.refreshToken);
});

test("refreshes of one token at the same time all succeed, and are bounded", async () => {
  const host = await register();
  const answers = await Promise.all(
    Array.from({ length: 12 }, () => plane.services.refreshHostTokens(host.refreshToken)),
  );
  const { count } = await plane.deps.db
    .selectFrom("host_refresh_tokens")
    .select((eb) => eb.fn.countAll<bigint>().as("count"))
    .where("host_id", "=", host.id)
    .executeTakeFirstOrThrow();
  assert.equal(count, 9n);
  await plane.services.refreshHostTokens(answers.at(-1)?.refreshToken ?? "");
});

test("an expired or unknown refresh token is an invalid_token", async () => {
  const host = await register();
  await refused(plane.services.refreshHostTokens(randomBytes(32).toString("hex")));
  await plane.deps.db
    .updateTable("host_refresh_tokens")
    .set({ expires_at: new Date(0) })
    .where("host_id", "=", host.id)
    .execute();
  await refused(plane.services.refreshHostTokens(host.refreshToken));
});

test("an address off loopback needs a certificate to pin", async () => {
  const { registrationToken } = await invite();
  const facts = factsOf(agent, registrationToken);
  for (const address of [
    "10.0.0.1:7071",
    "example.org:7071",
    "127.0.0.1",
    "127.0.0.1:0",
    "http://127.0.0.1:1",
  ]) {
    await assert.rejects(plane.services.registerHost({ ...facts, address }), { code: "invalid_request" });
  }
  const certificateFingerprint = "a".repeat(64);
  await plane.services.registerHost({ ...facts, address: "10.0.0.1:7071", certificateFingerprint });
});

test("a member has its own hosts, and sees no other", async () => {
  const member = await plane.newCaller();
  const stranger = await plane.newCaller();
  await assert.rejects(plane.services.createHost(member, { name: "h", type: "shared", labels: {} }), {
    code: "forbidden",
  });
  const { host } = await plane.services.createHost(member, {
    name: "mine",
    type: "byoc",
    labels: { a: "b" },
  });
  assert.deepEqual([host.teamId, host.labels], [member.teamId, { a: "b" }]);
  await assert.rejects(plane.services.getHost(stranger, host.id), { code: "not_found" });
  await assert.rejects(plane.services.newRegistrationToken(stranger, host.id), { code: "not_found" });
  assert.deepEqual((await plane.services.listHosts(stranger, { limit: 10 })).items, []);
  assert.equal((await plane.services.listHosts(member, { limit: 10 })).items.length, 1);
  assert.equal((await plane.services.getHost(operator, host.id)).name, "mine");
});
