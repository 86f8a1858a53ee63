/** Calls that go on to the guest. */
import { strict as assert } from "node:assert";
import { afterEach, beforeEach, expect, test } from "vitest";
import {
  beginStream,
  exitFrame,
  lastFrame,
  readBody,
  startFakeEnvd,
  startFrame,
  stdoutFrame,
} from "../guest/testing/fake-envd.ts";
import { creation, ID, openRig, refused, type RpcRig } from "./testing/rpc-rig.ts";

let rig: RpcRig;
let client: RpcRig["client"];
let operations: RpcRig["operations"];

beforeEach(async () => {
  rig = await openRig();
  ({ client, operations } = rig);
});
afterEach(() => rig[Symbol.asyncDispose]());

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
