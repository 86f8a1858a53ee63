/**
 * What a fleet does when something that it stands on is away or is another one:
 * two replicas and agents with sandboxes, as programs. Nothing is destroyed, and
 * nobody is taken for silent for what is the database's or the control plane's
 * fault.
 *
 * Times are those of production divided by 15; the long form has the real ones.
 */
import assert from "node:assert/strict";
import { afterAll, beforeAll, test } from "vitest";
import { type Api, eventually } from "../api.ts";
import {
  type Agent,
  Fleet,
  type HostRow,
  type Replica,
  START_MS,
  becomes,
  credentialsOf,
  heard,
} from "./fleet.ts";

const isLong = process.env["ROOKERY_LONG"] !== undefined;
const SILENT_MS = isLong ? 90_000 : 6_000;
const OUTAGE_MS = 2 * SILENT_MS;
const LOST_AFTER_MS = isLong ? 300_000 : 4_000;
const TIMES: Record<string, string> = isLong
  ? {}
  : {
      ROOKERY_HEARTBEAT_MS: "1000",
      ROOKERY_HOST_SILENT_MS: String(SILENT_MS),
      ROOKERY_HOST_CHECK_MS: "1000",
      ROOKERY_HOST_COMPARE_MS: "2000",
      ROOKERY_OPERATION_LEASE_MS: "5000",
    };
const TIMEOUT_MS = 1_800_000;
/** More than five, and more than a fifth of its host's: nothing is done to so many strangers. */
const MANY = 6;
const FEW = 3;

const cleanup = new AsyncDisposableStack();
let fleet: Fleet;
let replicas: [Replica, Replica];
let agents: [Agent, Agent];
let api: Api;
/** Per agent; each has its own id in its memory. */
let sandboxes: [string[], string[]];

beforeAll(async () => {
  fleet = cleanup.use(await Fleet.open({ env: TIMES }));
  replicas = [await fleet.replica("replica-0"), await fleet.replica("replica-1")];
  for (const { program } of replicas) program.start();
  await Promise.all(replicas.map(({ ready }) => ready()));
  api = await fleet.api(replicas[0]);
  agents = [await newAgent(0), await newAgent(1)];
  for (const { program } of agents) program.start();
  await Promise.all(agents.map((agent) => heard(api, agent, 0)));
  const made = await Promise.all(Array.from({ length: 2 * MANY }, () => api.create({ timeout_sec: 0 })));
  const on = (agent: Agent): string[] =>
    made.filter((sandbox) => sandbox.host_id === agent.hostId).map(({ id }) => id);
  sandboxes = [on(agents[0]), on(agents[1])];
  assert.deepEqual(
    sandboxes.map(({ length }) => length),
    [MANY, MANY],
  );
  for (const id of sandboxes[1].splice(FEW)) await api.destroy(id);
  for (const id of all()) await api.writeFile(id, "/tmp/mine", Buffer.from(id));
}, 300_000);
afterAll(() => cleanup.disposeAsync());

const all = (): string[] => sandboxes.flat();
const newAgent = (index: 0 | 1): Promise<Agent> =>
  fleet.agent(`agent-${index}`, { api, controlPlane: replicas[index].url });

/** They have what they had, and answer. */
async function areWhole(ids: readonly string[]): Promise<void> {
  for (const id of ids) assert.equal(Buffer.from(await api.readFile(id, "/tmp/mine")).toString(), id);
}

const eventsSince = (number: bigint | string) =>
  fleet.database.execute<{ sandbox_id: string; status: string }>(
    `select sandbox_id, status from sandbox_events where number > $1`,
    [number],
  );
async function lastEvent(): Promise<string> {
  const [row] = await fleet.database.execute<{ last: string }>(
    "select coalesce(max(number), 0)::text as last from sandbox_events",
  );
  return row?.last ?? "0";
}

/** The replicas' places are taken by programs on another database. */
async function pointAt(name: string, env: Record<string, string>): Promise<Replica[]> {
  await Promise.all(replicas.map(({ program }) => program.end("SIGTERM")));
  const others = await Promise.all(
    replicas.map(({ url }, index) =>
      fleet.replica(`${name}-${index}`, { ...env, ROOKERY_PORT: new URL(url).port }),
    ),
  );
  for (const { program } of others) program.start();
  await Promise.all(others.map(({ ready }) => ready()));
  return others;
}

async function pointBack(others: readonly Replica[]): Promise<number> {
  await Promise.all(others.map(({ program }) => program.end("SIGTERM")));
  const since = Date.now();
  for (const { program } of replicas) program.start();
  await Promise.all(replicas.map(({ ready }) => ready()));
  return since;
}

test(
  "a database that is away for twice the time of silence leaves every host online",
  { timeout: TIMEOUT_MS },
  async () => {
    const before = await lastEvent();
    await fleet.database.goAway();
    const comesBackAt = Date.now() + OUTAGE_MS;
    const answer = await api.call<{ error: { code: string } }>("GET", "/v1/sandboxes");
    assert.deepEqual([answer.status, answer.body.error.code], [503, "unavailable"]);
    assert.ok(answer.headers.get("retry-after"));
    await eventually("the outage is over", OUTAGE_MS + START_MS, () =>
      Date.now() >= comesBackAt ? true : undefined,
    );
    fleet.database.comeBack();
    const since = Date.now();
    // As long as any verdict on the time of the outage could take, and several rounds.
    await eventually("the time of silence is over again", SILENT_MS + START_MS, async () => {
      const { items } = await api.must<{ items: HostRow[] }>(200, "GET", "/v1/hosts").catch(() => ({
        items: [],
      }));
      for (const { id, status } of items) assert.equal(status, "online", id);
      return Date.now() - since > 1.5 * SILENT_MS && items.length > 0 ? true : undefined;
    });
    await Promise.all(agents.map((agent) => heard(api, agent, since)));
    for (const { program } of replicas) assert.doesNotMatch(program.log(), /a host went silent/);
    assert.deepEqual(await eventsSince(before), [], "no sandbox was touched");
    await areWhole(all());
  },
);

test(
  "a control plane on an old backup, which knows none of the sandboxes, destroys none of them",
  { timeout: TIMEOUT_MS },
  async () => {
    const backup = await fleet.emptyDatabase();
    await backup.copyFrom(fleet.database, ["cluster", "teams", "api_keys", "hosts", "host_refresh_tokens"]);
    await backup.execute("update teams set live_sandboxes = 0");
    await backup.execute("insert into host_sandbox_digests (host_id, digest) select id, 0 from hosts");
    const others = await pointAt("on-a-backup", { DATABASE_URL: backup.url });
    const strangers = await eventually("the strangers were seen", START_MS, async () => {
      const rows = await backup.execute<{ id: string; strangers: number; strangers_untouched: boolean }>(
        "select id, strangers, strangers_untouched from hosts where strangers > 0",
      );
      return rows.length === 2 ? rows : undefined;
    });
    assert.deepEqual(
      agents.map(({ hostId }) => {
        const row = strangers.find(({ id }) => id === hostId);
        return [row?.strangers, row?.strangers_untouched];
      }),
      [
        [MANY, true],
        [FEW, false],
      ],
    );
    assert.equal((await api.live()).length, 0);
    const since = await pointBack(others);
    await Promise.all(agents.map((agent) => heard(api, agent, since)));
    await becomes(api, all(), "running");
    await areWhole(all());
  },
);

test(
  "a control plane on an empty database is nobody's: agents pause what they have, and keep it",
  { timeout: TIMEOUT_MS },
  async () => {
    const empty = await fleet.emptyDatabase();
    const kept = agents.map(credentialsOf);
    const others = await pointAt("on-nothing", { DATABASE_URL: empty.url });
    for (const { program } of agents) {
      await eventually(`${program.name} has paused all\n${program.tail()}`, START_MS, () =>
        program.log().includes("paused what ran") ? true : undefined,
      );
    }
    const [known] = await empty.execute<{ hosts: string }>("select count(*)::text as hosts from hosts");
    assert.equal(known?.hosts, "0");
    const since = await pointBack(others);
    await Promise.all(agents.map((agent) => heard(api, agent, since)));
    assert.deepEqual(agents.map(credentialsOf), kept, "they are known by what they had");
    await becomes(api, all(), "paused");
    await Promise.all(all().map((id) => api.resume(id)));
    await areWhole(all());
  },
);

test(
  "without a control plane for longer than the limit all is paused; its return needs no person",
  { timeout: TIMEOUT_MS },
  async () => {
    const agent = await fleet.agent("strict-agent", {
      api,
      controlPlane: replicas[0].url,
      env: { ROOKERY_LOST_AFTER_MS: String(LOST_AFTER_MS) },
    });
    agent.program.start();
    await heard(api, agent, 0);
    // The others take no new ones.
    for (const { hostId } of agents) await api.must(200, "POST", `/v1/hosts/${hostId}/drain`);
    const mine = (await Promise.all(Array.from({ length: 4 }, () => api.create({ timeout_sec: 0 })))).map(
      (sandbox) => {
        assert.equal(sandbox.host_id, agent.hostId);
        return sandbox.id;
      },
    );
    for (const id of mine) await api.writeFile(id, "/tmp/mine", Buffer.from(id));
    await Promise.all(replicas.map(({ program }) => program.kill()));
    await eventually(`the agent has paused all\n${agent.program.tail()}`, LOST_AFTER_MS + 2 * START_MS, () =>
      /"paused":4.*paused what ran/.test(agent.program.log()) ? true : undefined,
    );
    const since = Date.now();
    for (const { program } of replicas) program.start();
    await replicas[0].ready();
    await heard(api, agent, since);
    await becomes(api, mine, "paused");
    // The others, with a longer limit, never noticed.
    await becomes(api, all(), "running");
    for (const id of mine) assert.equal((await api.resume(id)).status, "running");
    await areWhole(mine);
  },
);
