import { strict as assert } from "node:assert";
import { generateKeyPairSync } from "node:crypto";
import { connect as connectHttp2 } from "node:http2";
import { Code, ConnectError, createClient } from "@connectrpc/connect";
import type { Client } from "@connectrpc/connect";
import { createConnectTransport } from "@connectrpc/connect-node";
import {
  ErrorInfoSchema,
  HostAgentService,
  SandboxPhase,
  TimeoutAction,
  TimeoutMode,
} from "@rookery/protocol/hostagent";
import { SignJWT, UnsecuredJWT } from "jose";
import { afterEach, beforeEach, expect, test } from "vitest";
import { EnvdClient } from "../guest/envd-client.ts";
import { GUEST_LIMITS } from "../guest/limits.ts";
import {
  beginStream,
  exitFrame,
  lastFrame,
  readBody,
  startFakeEnvd,
  startFrame,
  stdoutFrame,
} from "../guest/testing/fake-envd.ts";
import { systemClock } from "../sandbox-manager/clock.ts";
import type { Trust } from "./auth.ts";
import { startRpcServer } from "./server.ts";
import type { RpcServer } from "./server.ts";
import { fakeOperations } from "./testing/fake-operations.ts";
import type { FakeOperations } from "./testing/fake-operations.ts";

const ID = "sbabcdefghijklmnopqr";
const { publicKey, privateKey } = generateKeyPairSync("ed25519");
const spki = publicKey.export({ format: "der", type: "spki" }).toString("base64");
const registered: Trust = { hostId: "host-1", clusterId: "cluster-1", controlPlaneKey: spki };

let trust: Trust | undefined;
let operations: FakeOperations;
let envd: EnvdClient;
let ends: number;
let server: RpcServer;
let authorization: string;
let client: Client<typeof HostAgentService>;
let lines: { level: string; facts: Record<string, unknown> }[];

const token = (claims: Record<string, unknown> = {}, lifeSec = 60): Promise<string> =>
  new SignJWT({ iss: "rookery-control-plane", aud: "host-1", ...claims })
    .setProtectedHeader({ alg: "EdDSA" })
    .setIssuedAt()
    .setExpirationTime(Math.floor(Date.now() / 1000) + lifeSec)
    .sign(privateKey);

beforeEach(async () => {
  trust = registered;
  operations = fakeOperations();
  ends = 0;
  envd = new EnvdClient({ ...GUEST_LIMITS, killGraceMs: 200 });
  lines = [];
  const log = (level: string) => (facts: object) => void lines.push({ level, facts: { ...facts } });
  const logger = { debug: log("debug"), info: log("info"), warn: log("warn"), error: log("error") };
  server = await startRpcServer({
    listen: { host: "127.0.0.1", port: 0 },
    trust: () => trust,
    operations,
    envd,
    endHost: async () => void (ends += 1),
    clock: systemClock,
    logger,
  });
  authorization = `Bearer ${await token()}`;
  client = createClient(
    HostAgentService,
    createConnectTransport({
      baseUrl: `http://127.0.0.1:${server.address.port}`,
      httpVersion: "2",
      useBinaryFormat: true,
      interceptors: [
        (next) => (request) => {
          request.header.set("authorization", authorization);
          return next(request);
        },
      ],
    }),
  );
});
afterEach(async () => {
  await server.close(100);
  await envd.close();
});

const operation = (overrides: object = {}) => ({
  sandboxId: ID,
  generation: 1n,
  deadlineUnixMs: BigInt(Date.now() + 60_000),
  clusterId: "cluster-1",
  ...overrides,
});
const creation = (overrides: object = {}) => ({
  operation: operation(),
  source: { case: "image" as const, value: "base" },
  vcpus: 1,
  memoryMb: 512,
  diskMb: 4096,
  lifetime: { timeoutSec: 300, onTimeout: TimeoutAction.PAUSE, mode: TimeoutMode.IDLE },
  env: { A: "1" },
  teamId: "team-abcdefghijklmnopqrst",
  envdAccessToken: "secret-token",
  ...overrides,
});

async function refused(call: Promise<unknown>, code: string, field?: string): Promise<ConnectError> {
  const error = await call.then(
    () => assert.fail("it was not refused"),
    (cause: unknown) => cause,
  );
  assert(error instanceof ConnectError);
  const [info] = error.findDetails(ErrorInfoSchema);
  assert.equal(info?.code, code, error.message);
  if (field !== undefined) assert.equal(info.details["field"], field);
  return error;
}

test("a sandbox is created from what was asked, and comes back as it is", async () => {
  const { sandbox } = await client.createSandbox(creation());
  assert.equal(sandbox?.sandboxId, ID);
  assert.equal(sandbox.expiresAtUnixMs, 1_700_000_000_000n);
  assert.equal(sandbox.lifetime?.mode, TimeoutMode.IDLE);
  assert.deepEqual(operations.calls[0]?.args[0], {
    id: ID,
    teamId: "team-abcdefghijklmnopqrst",
    source: { kind: "image", name: "base" },
    vcpus: 1,
    memoryMb: 512,
    diskMb: 4096,
    lifetime: { timeoutSec: 300, onTimeout: "pause", mode: "idle" },
    env: { A: "1" },
    envdAccessToken: "secret-token",
  });
  assert.equal((await client.getSandbox({ sandboxId: ID })).sandbox?.memoryMb, 512);
  assert.equal((await client.listSandboxes({})).sandboxes.length, 1);
});

test("requests that break a rule are refused by name, and reach nobody", async () => {
  const cases: [object, string, string?][] = [
    [{ vcpus: 3 }, "unsupported_shape", "vcpus"],
    [{ memoryMb: 100 }, "unsupported_shape", "memory_mb"],
    [{ diskMb: 100_000 }, "unsupported_shape", "disk_mb"],
    [{ lifetime: undefined }, "invalid_request", "lifetime"],
    [{ lifetime: { timeoutSec: 1, mode: TimeoutMode.IDLE } }, "invalid_request", "lifetime.on_timeout"],
    [{ env: { "A=B": "1" } }, "invalid_request", "env"],
    [{ env: { A: "\0" } }, "invalid_request", "env.A"],
    [
      { env: Object.fromEntries(Array.from({ length: 65 }, (_, i) => [`K${i}`, ""])) },
      "invalid_request",
      "env",
    ],
    [{ teamId: "../x" }, "invalid_request", "team_id"],
    [{ envdAccessToken: "a b" }, "invalid_request", "envd_access_token"],
    [{ source: { case: "image", value: "../../etc" } }, "template_not_found"],
    [{ source: { case: "snapshotId", value: "snap-1" } }, "template_not_found"],
    [{ source: { case: undefined } }, "invalid_request", "source"],
    [{ operation: undefined }, "invalid_request", "operation"],
    [{ operation: operation({ sandboxId: "sb/../x" }) }, "not_found"],
    [{ operation: operation({ clusterId: "cluster-2" }) }, "forbidden"],
    [{ operation: operation({ deadlineUnixMs: 1n }) }, "timeout"],
    [
      { operation: operation({ deadlineUnixMs: 1n << 62n }) },
      "invalid_request",
      "operation.deadline_unix_ms",
    ],
    [{ operation: operation({ generation: -1n }) }, "invalid_request", "operation.generation"],
  ];
  for (const [overrides, code, field] of cases) {
    await refused(client.createSandbox(creation(overrides)), code, field);
  }
  assert.deepEqual(operations.calls, []);
});

test("a stranger is frozen and thawed, and the host is ended, by its own cluster alone", async () => {
  await client.createSandbox(creation());
  const clusterId = "cluster-1";
  const { sandbox: frozen } = await client.freezeSandbox({ sandboxId: ID, clusterId });
  assert.deepEqual([frozen?.phase, frozen?.inMemory, frozen?.strangerForMs], [SandboxPhase.PAUSED, true, 0n]);
  const { sandbox: thawed } = await client.thawSandbox({ sandboxId: ID, clusterId });
  assert.deepEqual(
    [thawed?.phase, thawed?.inMemory, thawed?.strangerForMs],
    [SandboxPhase.RUNNING, false, undefined],
  );
  await client.endHost({ clusterId });
  assert.equal(ends, 1);
  const wrong = { sandboxId: ID, clusterId: "cluster-2" };
  await refused(client.freezeSandbox(wrong), "forbidden");
  await refused(client.thawSandbox(wrong), "forbidden");
  await refused(client.endHost({ clusterId: "cluster-2" }), "forbidden");
  assert.equal(ends, 1);
});

test("an error of the table keeps its code, its status and its facts", async () => {
  await client.createSandbox(creation());
  const error = await refused(client.resumeSandbox({ operation: operation() }), "wrong_state");
  assert.equal(error.code, Code.FailedPrecondition);
  assert.deepEqual({ ...error.findDetails(ErrorInfoSchema)[0]!.details }, { status: "running", tries: "2" });
});

test("a fault of ours tells the caller nothing of this host, and the log all", async () => {
  const error = await refused(
    client.deleteSnapshot({ snapshotId: "snap-abcdefghijklmnopqrst", clusterId: "cluster-1" }),
    "internal",
  );
  assert(!error.rawMessage.includes("/var"));
  const line = lines.find(({ level }) => level === "error");
  assert.match(String(line?.facts["err"]), /\/var\/lib\/secret/);
});

test("a host says which of its snapshots lie in the object store", async () => {
  const ids = ["snap-aaaaaaaaaaaaaaaaaaaa", "snap-aaaaaaaaaaaaaastored", "no-snapshot"];
  const { snapshots } = await client.getSnapshots({ snapshotIds: ids });
  assert.deepEqual(
    snapshots.map(({ snapshotId, storeId }) => [snapshotId, storeId]),
    [
      [ids[0], ""],
      [ids[1], "store-1"],
    ],
  );
  const many = Array.from({ length: 1_001 }, () => ids[0]!);
  await refused(client.getSnapshots({ snapshotIds: many }), "invalid_request");
});

test("the log names calls and sandboxes, and no secret", async () => {
  await client.createSandbox(creation());
  const text = JSON.stringify(lines);
  assert.match(text, /CreateSandbox/);
  assert(text.includes(ID));
  assert(!text.includes("secret-token") && !text.includes(authorization.slice(7)));
});

test("forged, expired, unbounded and misdirected tokens are refused", async () => {
  const stranger = generateKeyPairSync("ed25519").privateKey;
  const now = Math.floor(Date.now() / 1000);
  const claims = { iss: "rookery-control-plane", aud: "host-1" };
  const bad: Record<string, string> = {
    forged: await new SignJWT(claims)
      .setProtectedHeader({ alg: "EdDSA" })
      .setIssuedAt()
      .setExpirationTime("60s")
      .sign(stranger),
    expired: await token({}, -61),
    "for another host": await token({ aud: "host-2" }),
    "from another issuer": await token({ iss: "someone" }),
    "without expiry": await new SignJWT(claims)
      .setProtectedHeader({ alg: "EdDSA" })
      .setIssuedAt()
      .sign(privateKey),
    "issued long ago": await token({}, 60).then(() =>
      new SignJWT(claims)
        .setProtectedHeader({ alg: "EdDSA" })
        .setIssuedAt(now - 4_000)
        .setExpirationTime(now + 60)
        .sign(privateKey),
    ),
    "for another purpose": await token({ purpose: "end-host" }),
    "alg none": new UnsecuredJWT(claims).setIssuedAt().setExpirationTime("60s").encode(),
    "alg HS256 with the public key": await new SignJWT(claims)
      .setProtectedHeader({ alg: "HS256" })
      .setIssuedAt()
      .setExpirationTime("60s")
      .sign(Buffer.from(spki)),
  };
  for (const [name, text] of Object.entries(bad)) {
    authorization = `Bearer ${text}`;
    const error = await client.getSandbox({ sandboxId: ID }).then(
      () => assert.fail(`a token ${name} was taken`),
      (cause: unknown) => cause,
    );
    assert(error instanceof ConnectError && error.code === Code.Unauthenticated, name);
  }
  authorization = "Basic abc";
  await refused(client.getSandbox({ sandboxId: ID }), "unauthenticated");
  assert.deepEqual(operations.calls, []);
});

test("a token that expired within the leeway still counts", async () => {
  authorization = `Bearer ${await token({}, -30)}`;
  await refused(client.getSandbox({ sandboxId: ID }), "not_found");
});

test("before registration nobody may command, and after a change of key only its owner", async () => {
  trust = undefined;
  await refused(client.getSandbox({ sandboxId: ID }), "unauthenticated");
  trust = registered;
  await refused(client.getSandbox({ sandboxId: ID }), "not_found");
  const other = generateKeyPairSync("ed25519")
    .publicKey.export({ format: "der", type: "spki" })
    .toString("base64");
  trust = { ...registered, controlPlaneKey: other };
  await refused(client.getSandbox({ sandboxId: ID }), "invalid_token");
});

test("a message past the bound is refused before it is read", async () => {
  await client.createSandbox(creation());
  const error = await client
    .exec({ sandboxId: ID, command: { cmd: "cat", stdin: new Uint8Array(6 << 20) } })
    .then(
      () => assert.fail("it was taken"),
      (error: unknown) => ConnectError.from(error),
    );
  assert.equal(error.code, Code.ResourceExhausted);
});

test("commands reach the guest and their answer comes back", async () => {
  await using fake = await startFakeEnvd({
    "POST /process.Process/Start": (_request, response) => {
      beginStream(response);
      response.end(Buffer.concat([startFrame(7), stdoutFrame(Buffer.from("hi")), exitFrame(2), lastFrame()]));
    },
  });
  await client.createSandbox(creation());
  await refused(client.exec({ sandboxId: ID, command: { cmd: "x" } }), "wrong_state");
  operations.envd = fake.target;
  const answer = await client.exec({ sandboxId: ID, command: { cmd: "x" } });
  assert.equal(Buffer.from(answer.stdout).toString(), "hi");
  assert.equal(answer.exitCode, 2);
  assert.equal(answer.signal, undefined);

  const kinds: (string | undefined)[] = [];
  for await (const { event } of client.execStream({ sandboxId: ID, command: { cmd: "x" } }))
    kinds.push(event.case);
  assert.deepEqual(kinds, ["start", "stdout", "end"]);
  await refused(client.exec({ sandboxId: ID, command: { cmd: "" } }), "invalid_request", "command.cmd");
  await refused(
    client.exec({ sandboxId: ID, command: { cmd: "x", args: ["\0"] } }),
    "invalid_request",
    "command.args",
  );
  await refused(
    client.exec({ sandboxId: ID, command: { cmd: "x", user: "a:b" } }),
    "invalid_request",
    "command.user",
  );
  await refused(client.exec({ sandboxId: ID, command: { cmd: "x", cwd: "\0" } }), "invalid_path");
});

test("a caller who leaves a stream ends the command and the use of the guest", async () => {
  let killed = false;
  await using fake = await startFakeEnvd({
    "POST /process.Process/Start": (_request, response) => {
      beginStream(response);
      response.write(startFrame(7));
    },
    "POST /process.Process/SendSignal": (_request, response) => {
      killed = true;
      response.writeHead(200, { "content-type": "application/proto" }).end();
    },
  });
  await client.createSandbox(creation());
  operations.envd = fake.target;
  const abort = new AbortController();
  const stream = client.execStream({ sandboxId: ID, command: { cmd: "x" } }, { signal: abort.signal });
  await assert.rejects(async () => {
    for await (const { event } of stream) if (event.case === "start") abort.abort();
  });
  await expect.poll(() => killed).toBe(true);
  await expect.poll(() => operations.uses).toBe(0);
});

test("a VM that ends under a call is a guest_error", async () => {
  await using fake = await startFakeEnvd({
    "POST /process.Process/Start": (_request, response) => {
      beginStream(response);
      response.write(startFrame(7));
      setImmediate(() => operations.vm.abort());
    },
  });
  await client.createSandbox(creation());
  operations.envd = fake.target;
  await refused(client.exec({ sandboxId: ID, command: { cmd: "x" } }), "guest_error");
});

// Megabytes through four programs: on a busy machine that takes seconds.
test("a file goes to the guest and comes back, byte for byte", async () => {
  let stored: Buffer = Buffer.alloc(0);
  await using fake = await startFakeEnvd({
    "POST /files": async (request, response) => {
      stored = await readBody(request);
      response.end("[]");
    },
    "GET /files": (_request, response) =>
      void response.writeHead(200, { "content-length": String(stored.byteLength) }).end(stored),
  });
  await client.createSandbox(creation());
  operations.envd = fake.target;
  const pieces = Array.from({ length: 5 }, (_, i) => Buffer.alloc(1 << 20, i));
  async function* upload() {
    yield { part: { case: "start" as const, value: { sandboxId: ID, path: "/f" } } };
    for (const piece of pieces) yield { part: { case: "chunk" as const, value: piece } };
  }
  assert.equal((await client.writeFile(upload())).sizeBytes, BigInt(5 << 20));
  assert(stored.equals(Buffer.concat(pieces)));
  const back: Uint8Array[] = [];
  let size: bigint | undefined;
  for await (const { sizeBytes, chunk } of client.readFile({ sandboxId: ID, path: "/f" })) {
    size ??= sizeBytes;
    back.push(chunk);
  }
  assert.equal(size, BigInt(5 << 20));
  assert(Buffer.concat(back).equals(stored));
  assert.equal(operations.uses, 0);
}, 60_000);

test("an upload without a name, or with a second one, is refused", async () => {
  async function* nameless() {
    yield { part: { case: "chunk" as const, value: new Uint8Array(1) } };
  }
  await refused(client.writeFile(nameless()), "invalid_request");
  await using fake = await startFakeEnvd({
    "POST /files": async (request, response) => {
      await readBody(request);
      response.end("[]");
    },
  });
  await client.createSandbox(creation());
  operations.envd = fake.target;
  async function* twice() {
    yield { part: { case: "start" as const, value: { sandboxId: ID, path: "/f" } } };
    yield { part: { case: "start" as const, value: { sandboxId: ID, path: "/g" } } };
  }
  await refused(client.writeFile(twice()), "invalid_request");
});

test("events come after a number, with the log's id first, and follow until the caller leaves", async () => {
  for (const number of [1n, 2n, 3n]) {
    operations.hostEvents.push({
      number,
      sandboxId: ID as never,
      generation: 1n,
      kind: "paused",
      reason: "expired",
      message: "",
      occurredAtUnixMs: 1,
    });
  }
  const numbers: (bigint | undefined)[] = [];
  for await (const { logId, event } of client.streamEvents({ afterNumber: 1n })) {
    assert.equal(logId, "log-1");
    numbers.push(event?.number);
  }
  assert.deepEqual(numbers, [undefined, 2n, 3n]);
  const abort = new AbortController();
  await assert.rejects(async () => {
    for await (const { event } of client.streamEvents({ follow: true }, { signal: abort.signal })) {
      if (event?.number === 3n) abort.abort();
    }
  });
});

test("closing waits for calls under way and takes no new ones", async () => {
  let end: (() => void) | undefined;
  await using fake = await startFakeEnvd({
    "POST /process.Process/Start": (_request, response) => {
      beginStream(response);
      response.write(startFrame(7));
      end = () => response.end(Buffer.concat([exitFrame(0), lastFrame()]));
    },
  });
  await client.createSandbox(creation());
  operations.envd = fake.target;
  const running = client.exec({ sandboxId: ID, command: { cmd: "x" } });
  await expect.poll(() => end).toBeDefined();
  const closing = server.close(5_000);
  end!();
  assert.equal((await running).exitCode, 0);
  await closing;
  const late = connectHttp2(`http://127.0.0.1:${server.address.port}`);
  await assert.rejects(new Promise((resolve, reject) => late.once("connect", resolve).once("error", reject)));
});

test("closing does not wait for those who follow events", async () => {
  const seen = Promise.withResolvers<void>();
  const following = (async () => {
    for await (const { logId } of client.streamEvents({ follow: true })) if (logId !== "") seen.resolve();
  })();
  await seen.promise;
  await server.close(60_000);
  await following;
});

test("without TLS, an address that others can reach is refused", async () => {
  for (const host of ["0.0.0.0", "10.0.0.1", "::", "example"]) {
    await assert.rejects(
      startRpcServer({
        listen: { host, port: 0 },
        trust: () => trust,
        operations,
        envd,
        endHost: async () => undefined,
        clock: systemClock,
        logger: { debug() {}, info() {}, warn() {}, error() {} },
      }),
      /loopback/,
    );
  }
});
