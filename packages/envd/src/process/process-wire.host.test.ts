/** What clients see byte by byte: E2B's read these frames by hand. */
import assert from "node:assert/strict";
import { afterAll, beforeAll, test } from "vitest";
import { EnvdProcess } from "../testing/envd-process.ts";

let envd: EnvdProcess;
beforeAll(async () => {
  envd = await EnvdProcess.start();
  assert.equal((await envd.init()).status, 204);
});
afterAll(async () => {
  envd.assertAlive();
  await envd[Symbol.asyncDispose]();
});

test("on the wire the JSON stream is what E2B's clients read", async () => {
  const message = JSON.stringify({
    process: { cmd: "/bin/sh", args: ["-c", "printf hi; exit 2"], envs: {} },
    stdin: false,
  });
  const answer = await envd.fetch("/process.Process/Start", {
    method: "POST",
    headers: { "content-type": "application/connect+json", "connect-protocol-version": "1" },
    body: frame(0, message),
  });
  assert.equal(answer.status, 200);
  assert.equal(answer.headers.get("content-type"), "application/connect+json");
  const frames = framesOf(Buffer.from(await answer.arrayBuffer()));
  const pid = JSON.parse(frames[0]!.text).event.start.pid as number;
  assert.deepEqual(frames, [
    { flags: 0, text: `{"event":{"start":{"pid":${pid}}}}` },
    { flags: 0, text: '{"event":{"data":{"stdout":"aGk="}}}' },
    {
      flags: 0,
      text: '{"event":{"end":{"exitCode":2,"exited":true,"status":"exit status 2","error":"exit status 2"}}}',
    },
    { flags: 2, text: "{}" },
  ]);
});

test("on the wire an error of a stream is its last frame, and of a unary call its status", async () => {
  const stream = await envd.fetch("/process.Process/Connect", {
    method: "POST",
    headers: { "content-type": "application/connect+json" },
    body: frame(0, '{"process":{"tag":"none"}}'),
  });
  assert.equal(stream.status, 200);
  assert.deepEqual(framesOf(Buffer.from(await stream.arrayBuffer())), [
    { flags: 2, text: '{"error":{"code":"not_found","message":"process with tag none not found"}}' },
  ]);
  const unary = await envd.fetch("/process.Process/SendSignal", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: '{"process":{"pid":4194305},"signal":"SIGNAL_SIGKILL"}',
  });
  assert.equal(unary.status, 404);
  assert.deepEqual(await unary.json(), {
    code: "not_found",
    message: "process with pid 4194305 not found",
  });
});

function frame(flags: number, text: string): Buffer {
  const head = Buffer.alloc(5);
  head.writeUInt8(flags, 0);
  head.writeUInt32BE(Buffer.byteLength(text), 1);
  return Buffer.concat([head, Buffer.from(text)]);
}

function framesOf(bytes: Buffer): { flags: number; text: string }[] {
  const frames: { flags: number; text: string }[] = [];
  for (let offset = 0; offset < bytes.length;) {
    const length = bytes.readUInt32BE(offset + 1);
    frames.push({ flags: bytes[offset]!, text: bytes.toString("utf8", offset + 5, offset + 5 + length) });
    offset += 5 + length;
  }
  return frames;
}
