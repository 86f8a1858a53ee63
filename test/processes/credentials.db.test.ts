/**
 * A SIGKILL at every failpoint of the exchanges of credentials, on both sides,
 * with the programs themselves. While one is down, weeks pass. Whoever was
 * killed, and whatever got lost with it: the host gets back in without a person,
 * and is never taken for a thief. A name that was not hit fails the test.
 *
 * All of them take three minutes: that is the long form (ROOKERY_LONG=1). Else a
 * sample, another one each day, is taken; that no line is left out is also proven
 * without processes, where each fails (credentials-lost.db.test.ts in the control
 * plane, control-plane-link.test.ts in the agent).
 */
import assert from "node:assert/strict";
import { generateKeyPairSync } from "node:crypto";
import { afterAll, beforeAll, describe, test } from "vitest";
import { CREDENTIAL_FAILPOINTS } from "../../packages/control-plane/src/hosts/failpoints.ts";
import { LINK_FAILPOINTS } from "../../packages/host-agent/src/control-plane/control-plane-link.ts";
import { REGISTER_FAILPOINTS } from "../../packages/host-agent/src/control-plane/register.ts";
import { type Api, eventually } from "../api.ts";
import { type Agent, Fleet, type Replica, START_MS, credentialsOf, heard } from "./fleet.ts";

/** Longer than an access token lives, and longer than any of the two old ones could be good by a clock. */
const DOWN_DAYS = 50;
/** How many of the failpoints of one test are taken in the short form. */
const SAMPLE = 2;
const TIMEOUT_MS = 900_000;
const of = (operation: string): string[] =>
  CREDENTIAL_FAILPOINTS.filter((name) => name.startsWith(`${operation}.`));
const both = (names: readonly string[]): string[] =>
  names.flatMap((name) => [`${name}.before`, `${name}.after`]);

function sample(names: readonly string[]): readonly string[] {
  if (process.env["ROOKERY_LONG"]) return names;
  const every = Math.ceil(names.length / SAMPLE);
  const start = Math.floor(Date.now() / 86_400_000) % every;
  const chosen = names.filter((_, index) => index % every === start);
  console.log(chosen.join(", "));
  return chosen;
}

const cleanup = new AsyncDisposableStack();
let fleet: Fleet;
let replica: Replica;
let api: Api;

beforeAll(async () => {
  fleet = cleanup.use(
    await Fleet.open({
      env: {
        // An agent renews its tokens within each second.
        ROOKERY_ACCESS_TOKEN_MS: "1000",
        ROOKERY_HEARTBEAT_MS: "100",
      },
    }),
  );
  replica = await fleet.replica("replica");
  replica.program.start();
  await replica.ready();
  api = await fleet.api(replica);
}, 120_000);
afterAll(() => cleanup.disposeAsync());

/** Weeks pass, for all tokens but those that nobody has spent yet. */
async function pass(): Promise<void> {
  await fleet.database.execute(
    `update host_refresh_tokens set expires_at = expires_at - interval '${DOWN_DAYS} days'`,
  );
  await fleet.database.execute(
    `update host_registration_tokens set expires_at = expires_at - interval '${DOWN_DAYS} days' where spent_at is not null`,
  );
}

const epochOf = async ({ hostId }: Agent): Promise<number> => {
  const [row] = await fleet.database.execute<{ epoch: number }>(
    `select epoch from hosts where id = '${hostId}'`,
  );
  assert.ok(row);
  return row.epoch;
};

/** What was spared by no failpoint goes on as if nothing had been. */
async function isIn(agent: Agent): Promise<void> {
  await heard(api, agent, Date.now());
  // By a heartbeat of the new tokens, and able to renew those.
  const { refreshToken } = credentialsOf(agent);
  await eventually(`${agent.program.name} renews its tokens\n${agent.program.tail()}`, START_MS, () =>
    credentialsOf(agent).refreshToken === refreshToken ? undefined : true,
  );
}

const newAgent = (name: string): Promise<Agent> => fleet.agent(name, { api, controlPlane: replica.url });

describe("registration", () => {
  test(
    "gets through, whichever line of the control plane's is its last",
    { timeout: TIMEOUT_MS },
    async () => {
      const names = sample(of("register-host"));
      const agent = await newAgent("registers-with-the-dying");
      for (const name of names) {
        replica.program.armKill(name);
        if (!agent.program.isRunning) agent.program.start();
        await replica.program.diedAt(name, START_MS);
        // The answer is on its way, or there.
        if (name === "register-host.answer.after") await agent.program.kill();
        await pass();
        replica.program.start();
      }
      if (!agent.program.isRunning) agent.program.start();
      await replica.ready();
      await isIn(agent);
      await agent.program.kill();
    },
  );

  test("gets through, whichever line of the agent's is its last", { timeout: TIMEOUT_MS }, async () => {
    const names = both(REGISTER_FAILPOINTS);
    const stored = names.slice(names.indexOf("register.store.after"));
    let agent = await newAgent("dies-registering");
    for (const name of sample(names)) {
      agent.program.armKill(name);
      agent.program.start();
      await agent.program.diedAt(name, START_MS);
      await pass();
      if (!stored.includes(name)) continue;
      // From here on it is registered, and does not register again.
      agent.program.start();
      await isIn(agent);
      await agent.program.kill();
      agent = await newAgent(`after-${name}`);
    }
    agent.program.start();
    await isIn(agent);
    await agent.program.kill();
  });
});

describe("a registered host", () => {
  let agent: Agent;
  beforeAll(async () => {
    agent = await newAgent("registered");
    agent.program.start();
    await isIn(agent);
    // Its end is an event, which heartbeats acknowledge from then on.
    await api.create({ timeout_sec: 10, on_timeout: "destroy" });
  }, 120_000);

  test(
    "gets back in, whichever line of the control plane's is its last",
    { timeout: TIMEOUT_MS },
    async () => {
      const names = sample([...of("refresh-host"), ...of("heartbeat-host")]);
      const kept = await api.create({ timeout_sec: 0 });
      const epoch = await epochOf(agent);
      for (const [index, name] of names.entries()) {
        replica.program.armKill(name);
        await replica.program.diedAt(name, START_MS);
        // Each second time both are gone, and the agent is back first.
        if (index % 2 === 1) await agent.program.kill();
        await pass();
        if (!agent.program.isRunning) agent.program.start();
        replica.program.start();
        await replica.ready();
        await isIn(agent);
        assert.equal(await epochOf(agent), epoch, `${name}: it was taken for a thief`);
      }
      assert.equal((await api.get(kept.id)).status, "running");
    },
  );

  test("gets back in, whichever line of its own is its last", { timeout: TIMEOUT_MS }, async () => {
    const kept = await api.create({ timeout_sec: 0 });
    const epoch = await epochOf(agent);
    for (const name of sample(both(LINK_FAILPOINTS))) {
      agent.program.armKill(name);
      await agent.program.diedAt(name, START_MS);
      await pass();
      agent.program.start();
      await isIn(agent);
      assert.equal(await epochOf(agent), epoch, `${name}: it was taken for a thief`);
    }
    assert.equal((await api.get(kept.id)).status, "running");
  });
});

test(
  "a thief's token ends the family, whichever line of that is the last",
  { timeout: TIMEOUT_MS },
  async () => {
    for (const name of sample(of("end-family"))) {
      const { host, registration_token: token } = await api.must<{
        host: { id: string };
        registration_token: string;
      }>(201, "POST", "/v1/hosts", { name: "robbed", type: "shared" });
      const { publicKey } = generateKeyPairSync("ed25519");
      const first = await api.must<{ refresh_token: string }>(200, "POST", "/v1/hosts/register", {
        ...FACTS,
        token,
        public_key: publicKey.export({ format: "der", type: "spki" }).toString("base64"),
      });
      const refresh = (refresh_token: string) =>
        api.call<{ access_token: string; refresh_token: string }>("POST", "/v1/hosts/auth/refresh", {
          refresh_token,
        });
      const { body: own } = await refresh(first.refresh_token);
      const beat = () =>
        api.call("POST", `/v1/hosts/${host.id}/heartbeat`, HEARTBEAT, {
          authorization: `Bearer ${own.access_token}`,
          "x-api-key": "",
        });
      assert.equal((await beat()).status, 200);

      replica.program.armKill(name);
      await assert.rejects(refresh(first.refresh_token));
      await replica.program.diedAt(name, START_MS);
      replica.program.start();
      await replica.ready();
      for (const shown of [first.refresh_token, own.refresh_token, first.refresh_token]) {
        assert.equal((await refresh(shown)).status, 401, name);
      }
      assert.equal((await beat()).status, 401, name);
    }
  },
);

test("a reseal that is killed anywhere is finished by the next one", { timeout: TIMEOUT_MS }, async () => {
  const keys = { ROOKERY_SECRET_KEY_OTHER: fleet.env["ROOKERY_SECRET_KEY"]! };
  const agent = await newAgent("sealed");
  // An answer that is kept, and has a secret.
  await api.call("POST", "/v1/hosts", { name: "kept", type: "shared" }, { "idempotency-key": "kept" });
  const other = { ...keys, ROOKERY_SECRET_KEY: "the next key of more than thirty-two characters" };
  const resealing = fleet.control("reseal", ["reseal"], other);
  for (const name of sample(of("reseal"))) {
    resealing.armKill(name);
    resealing.start();
    await resealing.diedAt(name, START_MS);
  }
  assert.deepEqual(JSON.parse(await fleet.command(["reseal"], other)), { resealed: { answers: 1 } });
  // What was sealed with the old key is not there any more, and hosts still know us.
  await replica.program.kill();
  const next = await fleet.replica("with-the-next-key", {
    ROOKERY_SECRET_KEY: other.ROOKERY_SECRET_KEY,
    ROOKERY_PORT: new URL(replica.url).port,
  });
  next.program.start();
  await replica.ready();
  agent.program.start();
  await isIn(agent);
});

const FACTS = {
  address: "127.0.0.1:1",
  arch: "x64",
  cpus: 1,
  memory_mb: 1,
  disk_mb: 1,
  drivers: {},
  version: "0",
};
const HEARTBEAT = {
  load: { cpus: 0, memory_mb_used: 0, disk_mb_free: 0, sandboxes: 0 },
  digest: "x1:0000000000000000",
  event_log_id: "log",
  last_event_number: 0,
};
