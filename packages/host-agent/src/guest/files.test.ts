/** Files of a guest, honest and hostile. */
import { strict as assert } from "node:assert";
import { afterEach, beforeEach, expect, test } from "vitest";
import { NotServed } from "../sandbox-manager/guest.ts";
import { EnvdClient } from "./envd-client.ts";
import { GUEST_LIMITS } from "./limits.ts";
import { readBody, startFakeEnvd } from "./testing/fake-envd.ts";
import type { Answer } from "./testing/fake-envd.ts";

const never = new AbortController().signal;

let envd: EnvdClient;
beforeEach(() => {
  envd = new EnvdClient({ ...GUEST_LIMITS, answerMs: 300, fileIdleMs: 300, connectMs: 300 });
});
afterEach(() => envd.close());

test("a file is written with its path and user, and its size comes back", async () => {
  let got: Buffer = Buffer.alloc(0);
  await using fake = await startFakeEnvd({
    "POST /files": async (request, response) => {
      assert.equal(request.url, "/files?path=%2Fa+b%26c&username=ann");
      assert.equal(request.headers["content-type"], "application/octet-stream");
      got = await readBody(request);
      response.end("[]");
    },
  });
  async function* content() {
    for (let i = 0; i < 50; i += 1) yield Buffer.alloc(100_000, i);
  }
  const size = await envd.writeFile(fake.target, { path: "/a b&c", user: "ann" }, content(), never);
  assert.equal(size, 5_000_000);
  assert.equal(got.byteLength, 5_000_000);
});

test("a sender that fails leaves the guest with a request that broke off", async () => {
  let broken: unknown;
  await using fake = await startFakeEnvd({
    "POST /files": async (request, response) => {
      broken = await readBody(request).then(
        () => undefined,
        (error: unknown) => error,
      );
      response.destroy();
    },
  });
  async function* content() {
    yield Buffer.from("half");
    throw new Error("sender gone");
  }
  await assert.rejects(envd.writeFile(fake.target, { path: "/a" }, content(), never), /^Error: sender gone$/);
  await expect.poll(() => broken).toBeInstanceOf(Error);
});

test("a guest that stops taking a file, or never answers, is a guest_error", async () => {
  await using fake = await startFakeEnvd({ "POST /files": () => undefined });
  async function* big() {
    for (;;) yield Buffer.alloc(1 << 20);
  }
  await assert.rejects(envd.writeFile(fake.target, { path: "/a" }, big(), never), { code: "guest_error" });
  async function* small() {
    yield Buffer.from("x");
  }
  await assert.rejects(envd.writeFile(fake.target, { path: "/a" }, small(), never), { code: "guest_error" });
});

test("files that are refused have the code of their cause, also before all was sent", async () => {
  let status = 0;
  await using fake = await startFakeEnvd({
    "POST /files": (_request, response) =>
      void response
        .writeHead(status, { "content-type": "application/json" })
        .end(`{"code":${status},"message":"no"}`),
  });
  async function* content() {
    yield Buffer.alloc(10);
  }
  const cases = { 400: "invalid_path", 404: "file_not_found", 507: "out_of_disk", 500: "guest_error" };
  for (const [code, expected] of Object.entries(cases)) {
    status = Number(code);
    await assert.rejects(envd.writeFile(fake.target, { path: "/a" }, content(), never), { code: expected });
  }
});

async function readAll(file: AsyncIterable<{ sizeBytes: number | undefined } | Uint8Array>) {
  let sizeBytes: number | undefined;
  const parts: Uint8Array[] = [];
  for await (const part of file) {
    if (part instanceof Uint8Array) parts.push(part);
    else sizeBytes = part.sizeBytes;
  }
  return { sizeBytes, bytes: Buffer.concat(parts) };
}

test("a file is read with its size", async () => {
  await using fake = await startFakeEnvd({
    "GET /files": (_request, response) =>
      void response.writeHead(200, { "content-length": "5" }).end("hello"),
  });
  const { sizeBytes, bytes } = await readAll(envd.readFile(fake.target, { path: "/a" }, never));
  assert.equal(sizeBytes, 5);
  assert.equal(bytes.toString(), "hello");
});

test("a file that falls silent, is cut, or is larger than any disk is a guest_error", async () => {
  const answers: Answer[] = [
    (_request, response) => void response.writeHead(200, { "content-length": "5" }).write("he"),
    (_request, response) => {
      response.writeHead(200, { "content-length": "5" });
      response.write("he", () => response.destroy());
    },
    (_request, response) => void response.writeHead(200, { "content-length": "999999999999999" }).write("he"),
  ];
  for (const answer of answers) {
    await using fake = await startFakeEnvd({ "GET /files": answer });
    await assert.rejects(readAll(envd.readFile(fake.target, { path: "/a" }, never)), { code: "guest_error" });
  }
});

test("a reader that leaves ends the guest's answer", async () => {
  let closed = false;
  await using fake = await startFakeEnvd({
    "GET /files": (_request, response) => {
      response.on("close", () => (closed = true));
      const feed = (): void => {
        while (!response.destroyed && response.write(Buffer.alloc(100_000))) continue;
      };
      response.on("drain", feed);
      feed();
    },
  });
  for await (const part of envd.readFile(fake.target, { path: "/a" }, never))
    if (part instanceof Uint8Array) break;
  await expect.poll(() => closed).toBe(true);
});

test("a refusal with 401 is about the user where envd knows us, and else about nobody's fault", async () => {
  const refuse: Answer = (_request, response) =>
    void response
      .writeHead(401, { "content-type": "application/json" })
      .end('{"code":401,"message":"unknown user"}');
  async function* content() {
    yield Buffer.from("x");
  }
  const failures = async (fake: { target: Parameters<EnvdClient["writeFile"]>[0] }) => {
    const file = { path: "/a", user: "ann" };
    const calls = [
      readAll(envd.readFile(fake.target, file, never)),
      envd.writeFile(fake.target, file, content(), never),
    ];
    return (await Promise.allSettled(calls)).map((call) =>
      call.status === "rejected" ? call.reason : undefined,
    );
  };
  await using knowing = await startFakeEnvd({
    "GET /files": refuse,
    "POST /files": refuse,
    "GET /metrics": (request, response) => {
      assert.equal(request.headers["x-access-token"], "token");
      response.end("{}");
    },
  });
  for (const error of await failures(knowing)) {
    expect(error).not.toBeInstanceOf(NotServed);
    expect(error).toMatchObject({ code: "invalid_request", details: { field: "user" } });
  }
  await using startedAgain = await startFakeEnvd({
    "GET /files": refuse,
    "POST /files": refuse,
    "GET /metrics": refuse,
  });
  for (const error of await failures(startedAgain)) expect(error).toBeInstanceOf(NotServed);
});
