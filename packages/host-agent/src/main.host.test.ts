/**
 * The program itself, as `up` starts it: registered by a one-time token with a
 * control plane of this test, without any guest.
 */
import { strict as assert } from "node:assert";
import { execFileSync, spawn } from "node:child_process";
import type { ChildProcess } from "node:child_process";
import { generateKeyPairSync } from "node:crypto";
import { once } from "node:events";
import { existsSync } from "node:fs";
import { mkdtemp, rm } from "node:fs/promises";
import { createServer } from "node:http";
import type { Server } from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createClient } from "@connectrpc/connect";
import { createConnectTransport } from "@connectrpc/connect-node";
import { HostAgentService } from "@rookery/protocol/hostagent";
import { SignJWT } from "jose";
import { afterAll, afterEach, beforeAll, beforeEach, expect, test } from "vitest";
import { z } from "zod";
import { readConfig } from "./config.ts";
import { removeTree } from "./host/atomic-file.ts";
import { listOwnedCgroups } from "./host/cgroup.ts";

const HOST_ID = "host-abcdefghijklmnopqrst";
const { publicKey, privateKey } = generateKeyPairSync("ed25519");
const controlPlaneKey = publicKey.export({ format: "der", type: "spki" }).toString("base64");
const sign = (audience: string): Promise<string> =>
  new SignJWT({})
    .setProtectedHeader({ alg: "EdDSA" })
    .setIssuer("rookery-control-plane")
    .setAudience(audience)
    .setIssuedAt()
    .setExpirationTime("60s")
    .sign(privateKey);
const registration = z.object({
  token: z.string(),
  address: z.string(),
  certificate_fingerprint: z.string().optional(),
  drivers: z.record(z.string(), z.string()),
});
/** TEST-NET-2 (RFC 5737): nobody's. */
const REMOTE = `198.51.100.${1 + (process.pid % 250)}`;
const LINK = `rkm${process.pid % 100_000}`;

let plane: Server;
let planeUrl: string;
let registered: z.output<typeof registration> | undefined;
let heartbeats: number;
let used: Set<string>;
let dir: string;
const agents: ChildProcess[] = [];

beforeAll(async () => {
  plane = createServer((request, response) => {
    const parts: Buffer[] = [];
    request.on("data", (part: Buffer) => parts.push(part));
    request.on(
      "end",
      () =>
        void answer(request.url!, Buffer.concat(parts).toString()).then(
          (text) => response.end(text),
          () => response.writeHead(401).end(),
        ),
    );
  }).listen(0, "127.0.0.1");
  await once(plane, "listening");
  const address = plane.address();
  if (address === null || typeof address === "string") throw new Error("no port");
  planeUrl = `http://127.0.0.1:${address.port}`;
});
afterAll(async () => {
  plane.closeAllConnections();
  plane.close();
  await once(plane, "close");
});

async function answer(path: string, body: string): Promise<string> {
  if (path.endsWith("/heartbeat")) {
    heartbeats += 1;
    return JSON.stringify({ acknowledged_event: 0 });
  }
  const asked = registration.parse(JSON.parse(body));
  if (used.has(asked.token)) throw new Error("it is used");
  used.add(asked.token);
  registered = asked;
  return JSON.stringify({
    host_id: HOST_ID,
    cluster_id: "cluster-1",
    access_token: await sign("rookery-control-plane"),
    refresh_token: "refresh",
    control_plane_key: controlPlaneKey,
  });
}

beforeEach(async () => {
  dir = await mkdtemp(join(tmpdir(), "rookery-agent-"));
  registered = undefined;
  heartbeats = 0;
  used = new Set();
});
afterEach(async () => {
  for (const agent of agents.splice(0)) {
    if (agent.exitCode !== null || agent.signalCode !== null) continue;
    agent.kill("SIGKILL");
    await once(agent, "exit");
  }
  await runAgent(["destroy-all"]);
  await removeTree(dir);
});

function startAgent(args: string[]): ChildProcess {
  const agent = spawn(process.execPath, [join(import.meta.dirname, "main.ts"), ...args], {
    env: {
      PATH: process.env["PATH"],
      ROOKERY_AGENT_DATA: join(dir, "data"),
      ROOKERY_RUNTIME_DIR: join(dir, "run"),
      ROOKERY_POOL: "0",
      ROOKERY_HEARTBEAT_MS: "100",
    },
    stdio: ["ignore", "pipe", "pipe"],
  });
  agents.push(agent);
  return agent;
}

async function runAgent(args: string[]): Promise<{ code: unknown; stdout: string; stderr: string }> {
  const agent = startAgent(args);
  let [stdout, stderr] = ["", ""];
  agent.stdout!.setEncoding("utf8").on("data", (text: string) => (stdout += text));
  agent.stderr!.setEncoding("utf8").on("data", (text: string) => (stderr += text));
  const [code]: unknown[] = await once(agent, "close");
  return { code, stdout, stderr };
}

const serveArgs = (address = "127.0.0.1:0", token = "token") => [
  "serve",
  "--control-plane",
  planeUrl,
  "--register",
  token,
  "--address",
  address,
];

async function serving(args: string[]): Promise<ChildProcess> {
  const before = heartbeats;
  const agent = startAgent(args);
  agent.stdout!.resume();
  agent.stderr!.pipe(process.stderr);
  await expect.poll(() => heartbeats, { timeout: 60_000 }).toBeGreaterThan(before);
  return agent;
}

test("an agent registers, beats, answers its control plane alone, and ends at SIGTERM", async () => {
  const agent = await serving(serveArgs());
  assert.equal(registered!.drivers["vmm"], "qemu");
  let authorization = `Bearer ${await sign(HOST_ID)}`;
  const client = createClient(
    HostAgentService,
    createConnectTransport({
      baseUrl: `http://${registered!.address}`,
      httpVersion: "2",
      interceptors: [
        (next) => (request) => {
          request.header.set("authorization", authorization);
          return next(request);
        },
      ],
    }),
  );
  assert.deepEqual((await client.listSandboxes({})).sandboxes, []);
  authorization = `Bearer ${await sign("host-another")}`;
  await assert.rejects(client.listSandboxes({}), /not valid for this host/);

  const second = await runAgent(serveArgs());
  assert.equal(second.code, 1);
  assert.match(second.stderr, new RegExp(`in use by process ${agent.pid}`));

  agent.kill("SIGTERM");
  assert.deepEqual(await once(agent, "exit"), [0, null]);
});

test("an agent that was killed goes on with its credentials; destroy-all ends it and leaves nothing on the host", async () => {
  const first = await serving(serveArgs());
  first.kill("SIGKILL");
  await once(first, "exit");
  registered = undefined;
  const again = await serving(["serve", "--address", "127.0.0.1:0"]);
  assert.equal(registered, undefined);

  const { code, stdout } = await runAgent(["destroy-all", "--json"]);
  assert.equal(code, 0);
  assert.deepEqual(JSON.parse(stdout), { destroyed: true, failures: [] });
  assert.notEqual(again.exitCode ?? again.signalCode, null);
  assert(!existsSync(join(dir, "run")));
  const { cgroup } = readConfig({ ROOKERY_AGENT_DATA: join(dir, "data") }, {}, "/");
  assert.deepEqual(await listOwnedCgroups(cgroup), []);
});

test("a host that is ended forgets who it was, and its agent ends and says why", async () => {
  const agent = await serving(serveArgs().slice(1)); // `serve` goes without saying
  let stderr = "";
  agent.stderr!.setEncoding("utf8").on("data", (text: string) => (stderr += text));
  const authorization = `Bearer ${await sign(HOST_ID)}`;
  const client = createClient(
    HostAgentService,
    createConnectTransport({ baseUrl: `http://${registered!.address}`, httpVersion: "2" }),
  );
  await client.endHost({ clusterId: "cluster-1" }, { headers: { authorization } });
  assert.deepEqual(await once(agent, "close"), [78, null]);
  assert.match(stderr, /this host was deleted/);
  assert(!existsSync(join(dir, "data", "credentials.json")));
  assert.match((await runAgent(["serve"])).stderr, /not registered/);
});

test("two agents with one token: one wins, and the other says that it was refused", async () => {
  used.add("token");
  const { code, stderr } = await runAgent(serveArgs());
  assert.equal(code, 3);
  assert.match(stderr, /refuses the registration token.*Ask for a new one/);
  assert(!existsSync(join(dir, "data", "credentials.json")));
});

test("on an address that others can reach it speaks TLS, with the certificate that it registered with", async () => {
  execFileSync("ip", ["link", "add", LINK, "type", "veth", "peer", "name", `${LINK}p`]);
  try {
    execFileSync("ip", ["addr", "add", `${REMOTE}/32`, "dev", LINK]);
    execFileSync("ip", ["link", "set", LINK, "up"]);
    const stop = async (agent: ChildProcess): Promise<void> => {
      agent.kill("SIGTERM");
      await once(agent, "exit");
    };
    await stop(await serving(serveArgs(`${REMOTE}:0`)));
    const { address, certificate_fingerprint: first } = registered!;
    assert.match(address, new RegExp(`^${REMOTE}:[1-9]`));
    assert.match(first!, /^[0-9a-f]{64}$/);
    await stop(await serving(["serve", "--address", address]));

    // Without it nobody could call this host: it does not pretend to work.
    await rm(join(dir, "data", "certificate.pem"));
    const { code, stderr } = await runAgent(["serve", "--address", address]);
    assert.equal(code, 1);
    assert.match(stderr, /certificate\.pem .* register the host again/);
    await stop(await serving(serveArgs(address, "another")));
    assert.notEqual(registered!.certificate_fingerprint, first);
  } finally {
    execFileSync("ip", ["link", "del", LINK]);
  }
});

test("an agent that nobody registered says what to do", async () => {
  const { code, stderr } = await runAgent(["serve"]);
  assert.equal(code, 1);
  assert.match(stderr, /not registered: start with --control-plane URL --register TOKEN/);
});

test("doctor tells programs and people alike what works here", async () => {
  const { code, stdout } = await runAgent(["doctor", "--json"]);
  const diagnosis = z
    .object({ ok: z.boolean(), findings: z.array(z.object({ area: z.string(), verdict: z.string() })) })
    .parse(JSON.parse(stdout));
  assert.equal(code, diagnosis.ok ? 0 : 1);
  for (const area of ["vmm", "root disk", "network"]) {
    assert(diagnosis.findings.some((finding) => finding.area === area));
  }
});
