/**
 * Three agents with real guests, two replicas of the control plane: sandboxes
 * are spread, a host that goes silent and comes back loses nothing, and what
 * died with a host is said to be dead.
 *
 * A product of its own, with shorter intervals than the other suites'. Thirty
 * emulated guests keep two cores busy for minutes: the long form (ROOKERY_LONG=1).
 */
import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { mkdirSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, test } from "vitest";
import { eventually } from "./api.ts";
import type { Api, Sandbox } from "./api.ts";
import { vmmPids } from "./host-inventory.ts";
import { Product, agentProgram, freePort, isAlive, repoDir, spawnAgent } from "./product.ts";
import { startReplica } from "./replica.ts";
import type { Replica } from "./replica.ts";

const HOSTS = 3;
const EACH = 10;
/** Scaled down by ten or so from 30 s, 90 s and 30 s. */
const SILENT_MS = 12_000;
const ROUND_MS = 2_000;
const INTERVALS = {
  ROOKERY_HEARTBEAT_MS: "1000",
  ROOKERY_HOST_SILENT_MS: String(SILENT_MS),
  ROOKERY_HOST_CHECK_MS: String(ROUND_MS),
  ROOKERY_HOST_CHECK_LIMIT_MS: String(ROUND_MS),
  ROOKERY_OPERATION_LEASE_MS: "5000",
};
/** Two cores emulate all guests: what the design allows is for machines that are not. */
const PATIENCE_MS = 90_000;

interface Host {
  id: string;
  name: string;
  status: string;
  sandboxes: number;
}
interface FleetAgent {
  hostId: string;
  agentDataDir: string;
  pid: number;
  start(args?: readonly string[]): number;
}

const dataDir = join(repoDir, ".rookery", `e2e-fleet-${process.pid}`);
const isWanted = process.env["ROOKERY_LONG"] !== undefined;
let product: Product;
let replica: Replica;
const agents: FleetAgent[] = [];
const cleanup = new AsyncDisposableStack();
/** Requests go to both replicas in turn. */
let turn = 0;
const api = (): Api => (turn++ % 2 === 0 ? product.api() : replica.api);

const hosts = async (): Promise<Host[]> =>
  (await product.api().must<{ items: Host[] }>(200, "GET", "/v1/hosts")).items;
const hostStatus = async (id: string): Promise<string | undefined> =>
  (await hosts()).find((host) => host.id === id)?.status;
const ofHost = async (id: string): Promise<Sandbox[]> =>
  (await product.api().live()).filter((sandbox) => sandbox.host_id === id);
const allOfHostAre = (id: string, status: string): Promise<true> =>
  eventually(`all sandboxes of ${id} are ${status}`, PATIENCE_MS, async () => {
    const list = await ofHost(id);
    return list.length === EACH && list.every((sandbox) => sandbox.status === status) ? true : undefined;
  });
/** A process that was started at the beginning; asks through either replica. */
const isProcessAlive = async (id: string): Promise<boolean> =>
  (await api().sh(id, "kill -0 $(cat /tmp/pid) && echo alive")) === "alive";

describe.skipIf(!isWanted)("three agents (in the long form: npm run test:long)", () => {
  beforeAll(async () => {
    mkdirSync(dataDir, { mode: 0o700 });
    product = new Product({
      dataDir,
      port: await freePort(),
      agentPort: await freePort(),
      env: {
        ROOKERY_IMAGE_DIR: join(repoDir, ".rookery", "test", "images"),
        ROOKERY_POOL: "1",
        ...INTERVALS,
      },
    });
    cleanup.defer(() => product.remove());
    await product.up();
    replica = cleanup.use(await startReplica(product));
    const [first] = await hosts();
    assert.ok(first);
    agents.push({
      hostId: first.id,
      agentDataDir: product.agentDataDir,
      pid: product.pid("agent"),
      start: () => assert.fail("the product's own agent is not ended here"),
    });
    for (let index = 1; index < HOSTS; index += 1) agents.push(await addAgent(`agent-${index}`));
    await eventually("all hosts are online", PATIENCE_MS, async () => {
      const list = await hosts();
      return list.length === HOSTS && list.every(({ status }) => status === "online") ? true : undefined;
    });
  });

  afterAll(() => cleanup.disposeAsync());

  test("30 sandboxes made through both replicas are spread 10, 10, 10", async () => {
    // Each host's first one boots its warm image.
    const made: Sandbox[] = [];
    for (let batch = 0; batch < EACH; batch += 1) {
      made.push(
        ...(await Promise.all(Array.from({ length: HOSTS }, () => api().create({ timeout_sec: 0 })))),
      );
    }
    for (const { hostId } of agents) {
      assert.equal(made.filter((sandbox) => sandbox.host_id === hostId).length, EACH, hostId);
    }
    for (const { id } of made) {
      await api().sh(id, "nohup sleep 1000000 >/dev/null 2>&1 & echo $! > /tmp/pid");
    }
  }, 900_000);

  test("a host that is stopped is unreachable, its sandboxes missing; they are back when it is", async () => {
    const agent = agents[1]!;
    const [sandbox] = await ofHost(agent.hostId);
    assert.ok(sandbox);
    process.kill(agent.pid, "SIGSTOP");
    try {
      await allOfHostAre(agent.hostId, "missing");
      assert.equal(await hostStatus(agent.hostId), "unreachable");
      const answer = await api().call<{ error: { code: string } }>(
        "POST",
        `/v1/sandboxes/${sandbox.id}/exec`,
        {
          cmd: "true",
        },
      );
      assert.equal(answer.status, 503, JSON.stringify(answer.body));
      assert.equal(answer.body.error.code, "host_unreachable");
      // The others are none the worse for it, and new ones go to them.
      const other = await api().create({ timeout_sec: 0 });
      assert.notEqual(other.host_id, agent.hostId);
      await api().destroy(other.id);
    } finally {
      process.kill(agent.pid, "SIGCONT");
    }
    await allOfHostAre(agent.hostId, "running");
    assert.equal(await hostStatus(agent.hostId), "online");
    assert.ok(await isProcessAlive(sandbox.id), "its processes went on");
  });

  test("after an agent was killed with some of its VMs, those are ended and the others run", async () => {
    const agent = agents[2]!;
    const mine = await ofHost(agent.hostId);
    process.kill(agent.pid, "SIGKILL");
    await eventually("the agent is gone", 10_000, () => (isAlive(agent.pid) ? undefined : true));
    const doomed = new Set<number>();
    for (const pid of vmmPids(agent.agentDataDir)) if (doomed.size < EACH / 2) doomed.add(pid);
    for (const pid of doomed) process.kill(pid, "SIGKILL");
    await allOfHostAre(agent.hostId, "missing");

    agent.pid = agent.start();
    const settled = await eventually("every row of it is true", PATIENCE_MS, async () => {
      const rows = await Promise.all(mine.map(({ id }) => product.api().get(id)));
      return rows.every(({ status }) => ["running", "stopped"].includes(status)) ? rows : undefined;
    });
    const alive = settled.filter(({ status }) => status === "running");
    // One of the killed may have been a waiting clone and nobody's sandbox.
    assert.ok(alive.length >= EACH / 2 && alive.length < EACH, `${alive.length} of ${EACH} run`);
    for (const { id } of alive) assert.ok(await isProcessAlive(id), id);
    for (const row of settled.filter(({ status }) => status !== "running")) {
      assert.ok(row.ended_at, `${row.id} ended`);
    }
    await product.api().destroyAll();
  });
});

/** Another host, by the one-time token that an operator would hand over. */
async function addAgent(name: string): Promise<FleetAgent> {
  const { host, registration_token: token } = await product
    .api()
    .must<{ host: Host; registration_token: string }>(201, "POST", "/v1/hosts", { name, type: "shared" });
  const agentDataDir = join(dataDir, name);
  mkdirSync(agentDataDir, { mode: 0o700 });
  const port = await freePort();
  const start = (args: readonly string[] = []): number => {
    const child = spawnAgent(
      {
        agentDataDir,
        port,
        logFile: join(dataDir, "logs", `${name}.log`),
        env: { ...product.options.env },
      },
      args,
    );
    assert.ok(child.pid);
    return child.pid;
  };
  cleanup.defer(() => {
    // A stopped process makes way for nobody.
    if (isAlive(agent.pid)) process.kill(agent.pid, "SIGCONT");
    execFileSync(process.execPath, [agentProgram, "destroy-all", "--data", agentDataDir], {
      env: { ...process.env, ...product.options.env },
    });
  });
  const controlPlane = `http://127.0.0.1:${product.options.port}`;
  const pid = start(["--register", token, "--control-plane", controlPlane]);
  const agent: FleetAgent = { hostId: host.id, agentDataDir, pid, start };
  return agent;
}
