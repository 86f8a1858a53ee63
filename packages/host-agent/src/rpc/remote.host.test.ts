/**
 * The agent's server on an address that others can reach, and the control
 * plane's own client: only the two of them, and only with what they agreed on.
 */
import { strict as assert } from "node:assert";
import { execFileSync } from "node:child_process";
import { createHash, generateKeyPairSync, randomBytes } from "node:crypto";
import type { KeyObject } from "node:crypto";
import { once } from "node:events";
import { mkdtemp } from "node:fs/promises";
import { connect as connectHttp2 } from "node:http2";
import { connect as connectTcp } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { connect as connectTls } from "node:tls";
import { RookeryError } from "@rookery/protocol/errors";
import { afterAll, afterEach, beforeAll, beforeEach, test } from "vitest";
import { openHostClient } from "../../../control-plane/src/hosts/host-client.ts";
import { commandTokens } from "../../../control-plane/src/hosts/tokens.ts";
import { openCertificate } from "../control-plane/certificate.ts";
import type { HostCertificate } from "../control-plane/certificate.ts";
import { EnvdClient } from "../guest/envd-client.ts";
import { removeTree } from "../host/atomic-file.ts";
import { systemClock } from "../sandbox-manager/clock.ts";
import { startRpcServer } from "./server.ts";
import type { RpcServer } from "./server.ts";
import { fakeOperations } from "./testing/fake-operations.ts";

type HostId = Parameters<ReturnType<typeof commandTokens>>[0];
const HOST_ID = "host-abcdefghijklmnopqrst" as HostId;
/** TEST-NET-2 (RFC 5737): nobody's. */
const HOST = `198.51.100.${1 + (process.pid % 250)}`;
const LINK = `rkt${process.pid % 100_000}`;
const { publicKey, privateKey } = generateKeyPairSync("ed25519");
const spki = publicKey.export({ format: "der", type: "spki" }).toString("base64");

let dir: string;
let certificate: HostCertificate;
let envd: EnvdClient;
let server: RpcServer;
let operations: ReturnType<typeof fakeOperations>;
const clients: { close(): void }[] = [];

beforeAll(() => {
  execFileSync("ip", ["link", "add", LINK, "type", "veth", "peer", "name", `${LINK}p`]);
  execFileSync("ip", ["addr", "add", `${HOST}/32`, "dev", LINK]);
  execFileSync("ip", ["link", "set", LINK, "up"]);
});
afterAll(() => void execFileSync("ip", ["link", "del", LINK]));
beforeEach(async () => {
  dir = await mkdtemp(join(tmpdir(), "rookery-remote-"));
  certificate = await openCertificate(dir, { nowMs: Date.now, randomBytes });
  envd = new EnvdClient();
  operations = fakeOperations();
  server = await startRpcServer({
    listen: { host: HOST, port: 0 },
    certificate: certificate.pem,
    trust: () => ({ hostId: HOST_ID, clusterId: "cluster-1", controlPlaneKey: spki }),
    operations,
    envd,
    endHost: async () => undefined,
    clock: systemClock,
    logger: { debug() {}, info() {}, warn() {}, error() {} },
    strangerMs: 500,
  });
});
afterEach(async () => {
  for (const client of clients.splice(0)) client.close();
  await server.close(100);
  await envd.close();
  await removeTree(dir);
});

const signed = (key: KeyObject = privateKey, now: () => number = Date.now) =>
  commandTokens({ signingKey: key } as Parameters<typeof commandTokens>[0], now);

function agent(options: { pin?: string | undefined; token?: (host: HostId) => Promise<string> } = {}) {
  const pin = "pin" in options ? options.pin : certificate.fingerprint;
  const client = openHostClient(
    {
      id: HOST_ID,
      address: `${HOST}:${server.address.port}`,
      ...(pin !== undefined && { certificateFingerprint: pin }),
      epoch: 1,
    },
    {
      clusterId: "cluster-1",
      answerGraceMs: 5_000,
      lookMs: 20_000,
      connectTimeoutMs: 10_000,
      pingIntervalMs: 5_000,
      pingTimeoutMs: 5_000,
      now: Date.now,
      token: options.token ?? signed(),
    },
  );
  clients.push(client);
  return client.agent;
}

const list = (options?: Parameters<typeof agent>[0]) =>
  agent(options).listSandboxes({ after: "", limit: 10 });
const code = (wanted: string) => (cause: unknown) => cause instanceof RookeryError && cause.code === wanted;

test("the control plane commands the host that shows the certificate it registered with", async () => {
  assert.deepEqual(await list(), { items: [], more: false });
});

test("another certificate than the pinned one is no host of ours", async () => {
  const pin = createHash("sha256").update("another").digest("hex");
  await assert.rejects(list({ pin }), code("host_unreachable"));
  assert.deepEqual(operations.calls, []);
});

test("plain HTTP gets nothing", async () => {
  await assert.rejects(list({ pin: undefined }), code("host_unreachable"));
  assert.deepEqual(operations.calls, []);
});

test("who shows no valid token of this cluster for this host is refused", async () => {
  const stranger = generateKeyPairSync("ed25519").privateKey;
  const cases: Record<string, (host: HostId) => Promise<string>> = {
    none: async () => "",
    forged: signed(stranger),
    "for another host": () => signed()("host-zzzzzzzzzzzzzzzzzzzz" as HostId),
    expired: signed(privateKey, () => Date.now() - 125_000),
    "of the future": signed(privateKey, () => Date.now() + 125_000),
  };
  for (const [name, token] of Object.entries(cases)) {
    await assert.rejects(list({ token }), code("host_error"), name);
    const events = agent({ token }).followEvents(0n, AbortSignal.timeout(20_000));
    await assert.rejects(events[Symbol.asyncIterator]().next(), code("host_error"), `${name}, on a stream`);
  }
  assert.deepEqual(operations.calls, []);
});

test("a stranger's message is not read, however long", async () => {
  const session = connectHttp2(`https://${HOST}:${server.address.port}`, { rejectUnauthorized: false });
  session.on("error", () => undefined);
  const stream = session.request({
    ":method": "POST",
    ":path": "/hostagent.v1.HostAgentService/ListSandboxes",
    "content-type": "application/proto",
  });
  stream.on("error", () => undefined);
  // More than the window lets through unread: were it read, this would go on.
  const feed = () => {
    while (!stream.destroyed && stream.write(Buffer.alloc(64 << 10))) continue;
  };
  stream.on("drain", feed);
  feed();
  const [headers] = (await once(stream, "response")) as [Record<string, unknown>];
  assert.equal(headers[":status"], 401);
  stream.resume();
  await once(stream, "close");
  await once(session, "close"); // and the connection ends, since nobody was admitted on it
});

test("a connection that says nothing ends by itself, before and after its handshake", async () => {
  const tls = connectTls({
    host: HOST,
    port: server.address.port,
    ALPNProtocols: ["h2"],
    rejectUnauthorized: false,
  });
  tls.on("error", () => undefined).resume();
  await once(tls, "secureConnect");
  await once(tls, "close");
  const old = connectTls({
    host: HOST,
    port: server.address.port,
    ALPNProtocols: ["h2"],
    maxVersion: "TLSv1.2",
    rejectUnauthorized: false,
  });
  await assert.rejects(once(old, "secureConnect"));
});

test("closing does not wait for a handshake that never ends", async () => {
  const tcp = connectTcp(server.address.port, HOST);
  tcp.on("error", () => undefined).resume();
  await once(tcp, "connect");
  const closed = once(tcp, "close");
  await server.close(50);
  await closed;
});
