/** Calls to an envd that was started again, as the border makes them. */
import { strict as assert } from "node:assert";
import { RookeryError } from "@rookery/protocol/errors";
import { afterEach, beforeEach, expect, test } from "vitest";
import { EnvdClient } from "../guest/envd-client.ts";
import { GUEST_LIMITS } from "../guest/limits.ts";
import type { Command } from "../guest/process-calls.ts";
import {
  beginStream,
  exitFrame,
  lastFrame,
  readBody,
  startFakeEnvd,
  startFrame,
  stdoutFrame,
} from "../guest/testing/fake-envd.ts";
import type { Answer, FakeEnvd } from "../guest/testing/fake-envd.ts";
import type { SandboxId } from "../ids.ts";
import { streamFromGuest, withGuest, withGuestOnce } from "./guest-calls.ts";
import { fakeOperations } from "./testing/fake-operations.ts";
import type { FakeOperations } from "./testing/fake-operations.ts";

const ID = "sbabcdefghijklmnopqr" as SandboxId;
const never = new AbortController().signal;
const command: Command = {
  cmd: "true",
  args: [],
  shell: false,
  env: {},
  stdin: new Uint8Array(),
  timeoutMs: 0,
};

let isInitialised: boolean;
let operations: FakeOperations;
let guest: FakeEnvd;
let envd: EnvdClient;
/** Bytes of the last upload. */
let uploaded: number;

/** As envd does before its /init. */
const guarded =
  (answer: Answer): Answer =>
  async (request, response) => {
    const body = await readBody(request);
    if (!isInitialised) {
      response.writeHead(401, { "content-type": "application/json" });
      response.end('{"code":401,"message":"envd is not initialised"}');
      return;
    }
    uploaded = body.byteLength;
    await answer(request, response);
  };

beforeEach(async () => {
  isInitialised = false;
  guest = await startFakeEnvd({
    "POST /process.Process/Start": guarded((_request, response) => {
      beginStream(response);
      response.end(
        Buffer.concat([startFrame(7), stdoutFrame(Buffer.from("out")), exitFrame(0), lastFrame()]),
      );
    }),
    "GET /metrics": guarded((_request, response) => void response.end("{}")),
    "GET /files": guarded((_request, response) => void response.end("content")),
    "POST /files": guarded((_request, response) => void response.end("[]")),
  });
  envd = new EnvdClient({ ...GUEST_LIMITS, connectMs: 100 });
  operations = fakeOperations();
  operations.envd = guest.target;
  operations.sandboxes.set(ID, {
    id: ID,
    phase: "running",
    inMemory: false,
    generation: 1n,
    vcpus: 1,
    memoryMb: 512,
    diskMb: 4096,
    lifetime: { timeoutSec: 0, onTimeout: "pause", mode: "idle" },
    expiresAtUnixMs: 0,
    startedAtUnixMs: 0,
    diskUsedBytes: 0,
  });
  operations.revive = async () => {
    isInitialised = true;
    return true;
  };
});
afterEach(async () => {
  await envd.close();
  await guest[Symbol.asyncDispose]();
});

const exec = (caller = never) =>
  withGuest(operations, ID, caller, (target, signal) =>
    envd.exec(target, command, { maxOutputBytes: 100 }, signal),
  );
const write = (content: AsyncIterable<Uint8Array>) =>
  withGuestOnce(operations, ID, never, (target, signal) =>
    envd.writeFile(target, { path: "/a" }, content, signal),
  );
const revivals = () => operations.calls.filter(({ name }) => name === "reviveGuest").length;

test("a command that envd did not know us for runs once it does", async () => {
  assert.equal(Buffer.from((await exec()).stdout).toString(), "out");
  assert.equal(revivals(), 1);
  assert.equal(operations.uses, 0);
});

test("a command that found nobody listening runs once somebody does", async () => {
  operations.envd = { ...guest.target, port: 1 };
  operations.revive = async () => {
    operations.envd = guest.target;
    isInitialised = true;
    return true;
  };
  assert.equal((await exec()).exitCode, 0);
  assert.equal(revivals(), 1);
});

test("streams begin anew, for nothing of them was there", async () => {
  const events: unknown[] = [];
  for await (const { kind } of streamFromGuest(operations, ID, never, (target, signal) =>
    envd.execStream(target, command, signal),
  ))
    events.push(kind);
  assert.deepEqual(events, ["start", "stdout", "end"]);

  isInitialised = false;
  const parts: unknown[] = [];
  for await (const part of streamFromGuest(operations, ID, never, (target, signal) =>
    envd.readFile(target, { path: "/a", user: "ann" }, signal),
  ))
    parts.push(part instanceof Uint8Array ? Buffer.from(part).toString() : "size");
  assert.deepEqual(parts, ["size", "content"]);
  assert.equal(operations.uses, 0);
});

test("an upload cannot be had twice: it fails, says when to try again, and then works", async () => {
  async function* content(): AsyncGenerator<Uint8Array> {
    yield Buffer.from("12345");
  }
  await expect(write(content())).rejects.toMatchObject({
    code: "guest_error",
    details: { retry_after_sec: 3 },
  });
  assert.equal(revivals(), 1);
  assert.equal(await write(content()), 5);
  assert.equal(uploaded, 5);
});

test("what is not revived fails, says so, and is tried once", async () => {
  operations.revive = async () => false;
  await expect(exec()).rejects.toMatchObject({
    code: "guest_error",
    message: /started again/,
    details: { retry_after_sec: 3 },
  });
  assert.equal(guest.requests.filter((request) => request.includes("Start")).length, 1);
  // Revived, says the agent, and yet refused: no third time.
  operations.revive = async () => true;
  await assert.rejects(exec(), { code: "guest_error" });
  assert.equal(guest.requests.filter((request) => request.includes("Start")).length, 3);
});

test("a call that broke in its middle is not made again, but sets the revival going", async () => {
  let opened = 0;
  const broken = withGuest(operations, ID, never, async () => {
    opened += 1;
    throw new RookeryError("guest_error", "The connection to the guest broke");
  });
  await assert.rejects(broken, /broke/);
  assert.equal(opened, 1);
  assert.equal(revivals(), 1);
});

test("what the guest refuses for the caller's sake is no reason to revive it", async () => {
  isInitialised = true;
  await using strict = await startFakeEnvd({
    "GET /metrics": (_request, response) => void response.end("{}"),
    "GET /files": (_request, response) => {
      response.writeHead(401, { "content-type": "application/json" });
      response.end('{"code":401,"message":"unknown user nobody-such"}');
    },
  });
  operations.envd = strict.target;
  const parts = streamFromGuest(operations, ID, never, (target, signal) =>
    envd.readFile(target, { path: "/a", user: "nobody-such" }, signal),
  );
  await assert.rejects(parts.next(), { code: "invalid_request" });
  assert.equal(revivals(), 0);
});

test("a caller that goes does not wait for the revival", async () => {
  const caller = new AbortController();
  operations.revive = () => {
    caller.abort();
    return new Promise(() => undefined);
  };
  await assert.rejects(exec(caller.signal), { code: "guest_error" });
});
