import { strict as assert } from "node:assert";
import { connect as connectHttp2 } from "node:http2";
import { Code, ConnectError } from "@connectrpc/connect";
import { ErrorInfoSchema, TimeoutMode } from "@rookery/protocol/hostagent";
import { afterEach, beforeEach, expect, test } from "vitest";
import { beginStream, exitFrame, lastFrame, startFakeEnvd, startFrame } from "../guest/testing/fake-envd.ts";
import { systemClock } from "../sandbox-manager/clock.ts";
import { startRpcServer } from "./server.ts";
import { creation, ID, openRig, operation, refused, type RpcRig } from "./testing/rpc-rig.ts";

let rig: RpcRig;
let client: RpcRig["client"];
let operations: RpcRig["operations"];
let server: RpcRig["server"];
let envd: RpcRig["envd"];
let lines: RpcRig["lines"];

beforeEach(async () => {
  rig = await openRig();
  ({ client, operations, server, envd, lines } = rig);
});
afterEach(() => rig[Symbol.asyncDispose]());

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
  assert(!text.includes("secret-token") && !text.includes(rig.authorization.slice(7)));
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
        trust: () => rig.trust,
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
