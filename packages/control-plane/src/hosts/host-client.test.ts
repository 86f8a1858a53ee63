import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { X509Certificate, createHash } from "node:crypto";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { type ServerHttp2Session, createSecureServer } from "node:http2";
import { type AddressInfo, type Socket, createServer } from "node:net";
import { tmpdir } from "node:os";
import path from "node:path";
import { RookeryError } from "@rookery/protocol/errors";
import { afterEach, expect, test } from "vitest";
import type { HostId, SandboxId, SnapshotId, TeamId } from "../model/ids.ts";
import { openHostClient } from "./host-client.ts";
import { FakeAgent, failing, holding } from "./testing/fake-agent.ts";

const id = "sbaaaaaaaaaaaaaaaaaa" as SandboxId;
const spec = {
  source: { kind: "image" as const, name: "base" },
  vcpus: 1,
  memoryMb: 512,
  diskMb: 4096,
  env: {},
  teamId: "team-aaaaaaaaaaaaaaaaaaaa" as TeamId,
  envdAccessToken: "secret",
  timeoutSec: 0,
  onTimeout: "pause" as const,
  timeoutMode: "idle" as const,
};
const command = { cmd: "echo", args: ["hi"], shell: false, env: {}, timeoutMs: 5_000 };
const operation = (generation: bigint) => ({
  sandboxId: id,
  generation,
  deadline: new Date(Date.now() + 5_000),
});
const closing: (() => unknown)[] = [];

afterEach(async () => {
  for (const close of closing.splice(0).toReversed()) await close();
});

function openClient(address: string, certificateFingerprint?: string) {
  return openBoth(address, certificateFingerprint).agent;
}

function openBoth(address: string, certificateFingerprint?: string) {
  const client = openHostClient(
    { id: "host-a" as HostId, address, certificateFingerprint, epoch: 1 },
    {
      clusterId: "cluster-a",
      answerGraceMs: 500,
      lookMs: 1_000,
      connectTimeoutMs: 1_000,
      pingIntervalMs: 50,
      pingTimeoutMs: 200,
      now: Date.now,
      token: async () => "a-token",
    },
  );
  closing.push(() => client.close());
  return client;
}

async function startAgent(): Promise<FakeAgent> {
  const fake = await new FakeAgent().listen();
  closing.push(() => fake[Symbol.asyncDispose]());
  return fake;
}

const code = (wanted: string) => (cause: unknown) => {
  assert.ok(cause instanceof RookeryError, String(cause));
  assert.equal(cause.code, wanted);
  return true;
};

test("commands and their answers cross the wire as they are meant", async () => {
  const fake = await startAgent();
  const agent = openClient(fake.address);
  const made = await agent.createSandbox(operation(3n), spec);
  assert.deepEqual(
    [made.id, made.phase, made.generation, made.startedAt?.getTime(), made.expiresAt, made.diskUsedBytes],
    [id, "running", 3n, 1_000, undefined, 12_288],
  );
  assert.equal((await agent.pauseSandbox(operation(4n))).phase, "paused");
  assert.equal((await agent.listSandboxes({ after: "", limit: 10 })).items.length, 1);
  const snapshot = "snap-aaaaaaaaaaaaaaaaaaaa" as SnapshotId;
  assert.equal((await agent.createSnapshot(operation(4n), snapshot, spec.teamId)).sizeBytes, 5_000_000_000);
  assert.equal(await agent.getSandbox("sbzzzzzzzzzzzzzzzzzz" as SandboxId), undefined);
  assert.deepEqual([...fake.tokens], ["a-token"]);
});

test("files stream both ways in pieces, and keep their bytes", async () => {
  const fake = await startAgent();
  const agent = openClient(fake.address);
  await agent.createSandbox(operation(1n), spec);
  const bytes = Buffer.alloc(3_500_000, "rookery");
  const signal = AbortSignal.timeout(10_000);
  await agent.writeFile(
    id,
    "/tmp/x",
    (async function* () {
      yield bytes.subarray(0, 10);
      yield bytes.subarray(10);
    })(),
    signal,
  );
  const { sizeBytes, content } = await agent.readFile(id, "/tmp/x", signal);
  assert.equal(sizeBytes, bytes.length);
  const read: Uint8Array[] = [];
  for await (const chunk of content) read.push(chunk);
  assert.ok(Buffer.concat(read).equals(bytes));
  await assert.rejects(agent.readFile(id, "/nothing", signal), code("file_not_found"));
});

test("an upload that its host refuses ends at once, and so does its source", async () => {
  const fake = await startAgent();
  const agent = openClient(fake.address);
  let isReleased = false;
  const endless = (async function* () {
    try {
      for (;;) yield Buffer.alloc(65_536);
    } finally {
      isReleased = true;
    }
  })();
  await assert.rejects(agent.writeFile(id, "/x", endless, AbortSignal.timeout(10_000)), code("not_found"));
  await expect.poll(() => isReleased).toBe(true);
});

test("what a host says about a request passes, what it says about us does not", async () => {
  const fake = await startAgent();
  const agent = openClient(fake.address);
  for (const [said, heard] of [
    ["wrong_state", "wrong_state"],
    ["out_of_disk", "out_of_disk"],
    ["rate_limited", "rate_limited"],
    ["guest_error", "guest_error"],
    ["unauthenticated", "host_error"],
    ["invalid_token", "host_error"],
    ["forbidden", "host_error"],
    ["internal", "host_error"],
    ["unavailable", "host_unreachable"],
  ] as const) {
    fake.before = failing("exec", said);
    await assert.rejects(agent.exec(id, command, AbortSignal.timeout(5_000)), code(heard), said);
  }
});

test("a host that is not there is host_unreachable, and one that comes back is used again", async () => {
  const fake = await startAgent();
  const agent = openClient(fake.address);
  await agent.createSandbox(operation(1n), spec);
  await fake.close();
  await assert.rejects(agent.getSandbox(id), code("host_unreachable"));
  await fake.listen();
  assert.equal((await agent.getSandbox(id))?.phase, "running");
});

test("a host that ends its idle connections, again and again, is no trouble", async () => {
  const fake = await startAgent();
  const agent = openClient(fake.address);
  for (let round = 0; round < 5; round++) {
    await agent.createSandbox(operation(1n), spec);
    await fake.close();
    await fake.listen();
  }
});

test("a command is sent again when its answer is lost; what runs in a guest never is", async () => {
  const fake = await startAgent();
  const agent = openClient(fake.address);
  await agent.createSandbox(operation(1n), spec);
  let isLost = false;
  fake.after = () => {
    if (!isLost) fake.hangUp();
    isLost = true;
  };
  assert.equal((await agent.pauseSandbox(operation(2n))).phase, "paused");
  assert.equal(fake.callsOf("pauseSandbox").length, 2);
  await agent.resumeSandbox(operation(3n));
  isLost = false;
  await assert.rejects(agent.exec(id, command, AbortSignal.timeout(5_000)), code("host_unreachable"));
  assert.equal(fake.callsOf("exec").length, 1);
});

test("closing a client ends what is under way, and nothing goes through it any more", async () => {
  const fake = await startAgent();
  const client = openBoth(fake.address);
  const held = holding("createSnapshot");
  fake.before = held.hook;
  const call = client.agent.createSnapshot(operation(1n), "snap-a" as SnapshotId, spec.teamId);
  const failed = assert.rejects(call, code("host_unreachable"));
  await held.arrived;
  client.close();
  await failed;
  held.release();
  await assert.rejects(client.agent.getSandbox(id), code("host_unreachable"));
});

test("a caller who goes away ends the call with his own reason", async () => {
  const fake = await startAgent();
  const agent = openClient(fake.address);
  const hold = holding("exec");
  fake.before = hold.hook;
  const leaving = new AbortController();
  const running = agent.exec(id, command, leaving.signal);
  await hold.arrived;
  leaving.abort(new Error("the client left"));
  await assert.rejects(running, /the client left/);
  hold.release();
});

test("a host that answers nothing, not even a connection, is given up in time", async () => {
  const mute = createServer();
  await new Promise<void>((resolve) => mute.listen(0, "127.0.0.1", resolve));
  closing.push(() => mute.close());
  const sockets = new Set<Socket>();
  mute.on("connection", (socket) => sockets.add(socket.on("error", () => undefined)));
  closing.push(() => sockets.forEach((socket) => socket.destroy()));
  const agent = openClient(`127.0.0.1:${(mute.address() as AddressInfo).port}`);
  const begun = Date.now();
  await assert.rejects(agent.getSandbox(id), (cause: RookeryError) =>
    ["timeout", "host_unreachable"].includes(cause.code),
  );
  assert.ok(Date.now() - begun < 5_000);
});

test("an agent is spoken to only when it shows the certificate that it registered", async () => {
  const { key, cert, fingerprint } = makeCertificate();
  let requests = 0;
  const server = createSecureServer({ key, cert }, (_request, response) => {
    requests++;
    response.writeHead(404).end();
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const sessions = new Set<ServerHttp2Session>();
  server.on("session", (session) => sessions.add(session.on("error", () => undefined)));
  closing.push(() => {
    for (const session of sessions) session.destroy();
    server.close();
  });
  const address = `127.0.0.1:${(server.address() as AddressInfo).port}`;
  await assert.rejects(openClient(address, "0".repeat(64)).getSandbox(id), code("host_unreachable"));
  assert.equal(requests, 0, "no request, and so no token, went to the stranger");
  // It speaks no Connect: that its answer makes no sense proves that it was asked.
  await assert.rejects(openClient(address, fingerprint).getSandbox(id), code("host_error"));
  assert.equal(requests, 1);
});

function makeCertificate(): { key: string; cert: string; fingerprint: string } {
  const dir = mkdtempSync(path.join(tmpdir(), "rookery-cert-"));
  try {
    const [keyFile, certFile] = [path.join(dir, "key.pem"), path.join(dir, "cert.pem")];
    const subject = ["-subj", "/CN=rookery-agent", "-days", "1"];
    const key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", keyFile];
    execFileSync("openssl", ["req", "-x509", ...key, "-out", certFile, ...subject], { stdio: "ignore" });
    const cert = readFileSync(certFile, "utf8");
    const fingerprint = createHash("sha256").update(new X509Certificate(cert).raw).digest("hex");
    return { key: readFileSync(keyFile, "utf8"), cert, fingerprint };
  } finally {
    rmSync(dir, { recursive: true });
  }
}
