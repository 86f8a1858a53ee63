/**
 * The `user` network under the whole agent: guests live and move as with any
 * other, and reach nothing of the host.
 */
import assert from "node:assert/strict";
import { createSocket } from "node:dgram";
import { once } from "node:events";
import { connect, createServer } from "node:net";
import { networkInterfaces } from "node:os";
import { pino } from "pino";
import { afterAll, afterEach, beforeAll, expect, test } from "vitest";
import type { SandboxId, SnapshotId } from "../ids.ts";
import { startRpcServer } from "../rpc/server.ts";
import { systemClock } from "../sandbox-manager/index.ts";
import { openRealAgent } from "../testing/real-agent.ts";
import type { RealAgent } from "../testing/real-agent.ts";

let real: RealAgent;
beforeAll(async () => {
  real = await openRealAgent({ ROOKERY_NETWORK: "user" });
  assert.equal(real.agent.network.kind, "user");
});
afterEach(async () => {
  assert.deepEqual(await real.agent.manager.destroyAll(), []);
});
afterAll(async () => {
  await real[Symbol.asyncDispose]();
});

const COUNTER =
  "setsid sh -c 'i=0; while :; do i=$((i+1)); echo $i > /tmp/n; mv /tmp/n /tmp/count; sleep 0.05; done' </dev/null >/dev/null 2>&1 & until [ -e /tmp/count ]; do sleep 0.01; done";

test("a sandbox runs, pauses, resumes and has children", async () => {
  const { agent } = real;
  const count = async (id: SandboxId) => Number(await real.sh(id, "cat /tmp/count"));
  const counts = async (id: SandboxId, above: number) => {
    await expect.poll(() => count(id), { timeout: 20_000 }).toBeGreaterThan(above);
  };
  const parent = await real.create();
  await real.sh(parent, COUNTER);

  const beforePause = await count(parent);
  assert.equal((await agent.manager.pause(real.nextOperation(parent))).phase, "paused");
  await assert.rejects(real.sh(parent, "true"), { code: "wrong_state" });
  assert.equal((await agent.manager.resume(real.nextOperation(parent))).phase, "running");
  await counts(parent, beforePause);

  const beforeSnapshot = await count(parent);
  const snapshotId = "snap-00000000000000000001" as SnapshotId;
  await agent.manager.createSnapshot(real.nextOperation(parent), snapshotId, "team-1");
  const child = await real.create({ kind: "snapshot", snapshotId });
  await counts(child, beforeSnapshot);
  await counts(parent, beforeSnapshot);
  assert.equal(await real.sh(child, "hostname"), child);
  assert.equal(await real.sh(parent, "hostname"), parent);
  await agent.manager.destroy(real.nextOperation(child));
  await agent.manager.destroy(real.nextOperation(parent));
  await agent.manager.deleteSnapshot(snapshotId);
});

test("a guest reaches neither host, agent, control plane, other guests, metadata nor any address beyond", async () => {
  // Each is there to be reached, from the host's own side.
  await using plane = await listen();
  await using server = await serveAgent();
  const [guest, other] = [await real.create(), await real.create()];
  const otherPort = await real.agent.manager.withEnvd(other, async ({ port }) => port);
  const ownPort = await real.agent.manager.withEnvd(guest, async ({ port }) => port);
  const hosts = ownAddresses();
  const gateways = ["10.0.2.2", "10.0.2.3", "10.0.2.4", "169.254.169.254", ...hosts];
  const tcp = [
    ...gateways.flatMap((host) =>
      [plane.port, server.port, otherPort, 22, 53, 80].map((port) => ({ host, port })),
    ),
    ...["10.0.0.1", "10.11.0.1", "10.12.0.1", "172.16.0.1", "192.168.0.1", "1.1.1.1", "fec0::2"].map(
      (host) => ({ host, port: 80 }),
    ),
    // envd of the other guest, as if they shared a wire.
    { host: "10.0.2.16", port: 49_983 },
  ];
  const udp = gateways.flatMap((host) => [plane.port, 53].map((port) => ({ host, port })));
  const script = `
import concurrent.futures as f, json, socket, sys
def family(a): return socket.AF_INET6 if ':' in a['host'] else socket.AF_INET
def tcp(a):
  try:
    with socket.socket(family(a)) as s:
      s.settimeout(3)
      s.connect((a['host'], a['port']))
      return f"tcp {a['host']} {a['port']}"
  except OSError: return None
def udp(a):
  try:
    with socket.socket(family(a), socket.SOCK_DGRAM) as s:
      s.settimeout(3)
      # A question for the root's name servers, which any resolver answers.
      s.sendto(bytes.fromhex('000101000001000000000000' '00' '0002' '0001'), (a['host'], a['port']))
      s.recv(512)
      return f"udp {a['host']} {a['port']}"
  except OSError: return None
tried = json.load(sys.stdin)
with f.ThreadPoolExecutor(64) as pool:
  reached = [*pool.map(tcp, tried['tcp']), *pool.map(udp, tried['udp'])]
try: reached.append(socket.gethostbyname('example.com'))
except OSError: pass
with socket.create_connection(('127.0.0.1', 49983), 3): print(json.dumps([each for each in reached if each]))
`;
  const said = await real.agent.manager.withEnvd(guest, (target) =>
    real.agent.envd.exec(
      target,
      {
        cmd: "python3",
        args: ["-c", script],
        shell: false,
        env: {},
        // As root, whom nothing in the guest holds back.
        user: "root",
        stdin: Buffer.from(JSON.stringify({ tcp, udp })),
        timeoutMs: 100_000,
      },
      { maxOutputBytes: 1 << 20 },
      AbortSignal.timeout(110_000),
    ),
  );
  assert.equal(said.exitCode, 0, Buffer.from(said.stderr).toString());
  assert.deepEqual(JSON.parse(Buffer.from(said.stdout).toString()), []);
  assert.equal(plane.seen(), 0, "something of the guest came through, though no answer went back");

  // They were all there.
  for (const host of ["127.0.0.1", ...hosts]) await plane.reach(host);
  assert.ok(plane.seen() > 0);
  for (const port of [server.port, otherPort, ownPort]) await connectTo("127.0.0.1", port);
  assert.equal(await real.sh(guest, "echo fine"), "fine");
});

interface Listener extends AsyncDisposable {
  port: number;
  /** Connections and datagrams that came so far. */
  seen(): number;
  /** Comes to it by both protocols, as a program of the host would. */
  reach(host: string): Promise<void>;
}

/** On all addresses of the host, TCP and UDP. */
async function listen(): Promise<Listener> {
  let seen = 0;
  const tcp = createServer((socket) => {
    seen += 1;
    socket.destroy();
  }).listen(0, "0.0.0.0");
  await once(tcp, "listening");
  const address = tcp.address();
  assert.ok(address !== null && typeof address === "object");
  const { port } = address;
  const udp = createSocket("udp4").bind(port, "0.0.0.0");
  await once(udp, "listening");
  udp.on("message", (message, from) => {
    seen += 1;
    udp.send(message, from.port, from.address);
  });
  return {
    port,
    seen: () => seen,
    async reach(host) {
      await connectTo(host, port);
      const client = createSocket("udp4");
      client.send("hello", port, host);
      await once(client, "message", { signal: AbortSignal.timeout(10_000) });
      client.close();
    },
    async [Symbol.asyncDispose]() {
      udp.close();
      tcp.close();
      await once(tcp, "close");
    },
  };
}

/** The port on which an agent is commanded. */
async function serveAgent(): Promise<{ port: number } & AsyncDisposable> {
  const { manager: operations, envd } = real.agent;
  const server = await startRpcServer({
    listen: { host: "127.0.0.1", port: 0 },
    trust: () => undefined,
    operations,
    envd,
    endHost: async () => undefined,
    clock: systemClock,
    logger: pino({ level: "silent" }),
  });
  return { port: server.address.port, [Symbol.asyncDispose]: () => server.close(0) };
}

async function connectTo(host: string, port: number): Promise<void> {
  const socket = connect({ host, port });
  await once(socket, "connect", { signal: AbortSignal.timeout(10_000) });
  socket.destroy();
}

function ownAddresses(): string[] {
  return Object.values(networkInterfaces())
    .flatMap((each) => each ?? [])
    .filter(({ family, internal }) => family === "IPv4" && !internal)
    .map(({ address }) => address);
}
