/** Whatever is wrong with a request, the answer says what, and the API goes on. */
import { afterAll, afterEach, beforeAll, describe, expect, test, vi } from "vitest";
import { openTestApi } from "./testing/test-api.ts";
import type { TestApi } from "./testing/test-api.ts";

// Machines that run every suite at once are slow.
vi.setConfig({ testTimeout: 60_000 });

let api: TestApi;
let sandbox: string;
beforeAll(async () => {
  api = await openTestApi();
  sandbox = (await api.call("POST", "/v1/sandboxes", {})).body.id;
});
afterEach(async () => {
  expect((await api.call("GET", "/healthz")).status).toBe(200);
  expect(api.log.filter(({ level }) => level >= 50)).toEqual([]);
});
afterAll(() => api[Symbol.asyncDispose]());

const entries = (count: number) =>
  Object.fromEntries(Array.from({ length: count }, (_, i) => [`k${i}`, "v"]));

describe("bodies of POST /v1/sandboxes", () => {
  test.each<[string, unknown, string, RegExp]>([
    ["an unknown field", { cpu: 1 }, "cpu", /not a field/],
    ["a field of another case", { Template: "base" }, "Template", /not a field/],
    ["a wrong type", { vcpus: "2" }, "vcpus", /must be 1, 2, 4 or 8/],
    ["a shape that is not offered", { vcpus: 3 }, "vcpus", /must be 1, 2, 4 or 8/],
    ["a wrong memory", { memory_mb: 513 }, "memory_mb", /must be 256, /],
    ["null for a number", { disk_mb: null }, "disk_mb", /must be an? (integer|number), but is null/],
    ["half a megabyte", { disk_mb: 4096.5 }, "disk_mb", /must be an integer/],
    ["a disk too big", { disk_mb: 65_537 }, "disk_mb", /at most 65536/],
    ["a negative disk", { disk_mb: -1 }, "disk_mb", /at least 1/],
    ["a number beyond all bounds", { disk_mb: 1e308 }, "disk_mb", /integer|at most/],
    ["a time-out too short", { timeout_sec: 9 }, "timeout_sec", /0 \(no limit\) or from 10/],
    ["a time-out too long", { timeout_sec: 604_801 }, "timeout_sec", /at most 604800/],
    ["an unknown choice", { on_timeout: "stop" }, "on_timeout", /pause or destroy/],
    ["an array for a map", { metadata: ["a"] }, "metadata", /object of strings/],
    ["a string for a map", { env: "A=1" }, "env", /object of strings/],
    ["a number in a map", { metadata: { k: 1 } }, "metadata.k", /must be a string, but is a number/],
    ["a map in a map", { metadata: { k: { a: "b" } } }, "metadata.k", /must be a string, but is an object/],
    ["an overlong metadata value", { metadata: { k: "x".repeat(513) } }, "metadata.k", /at most 512/],
    ["an overlong env value", { env: { K: "x".repeat(4097) } }, "env.K", /at most 4096/],
    ["an empty key", { metadata: { "": "x" } }, "metadata.", /empty key/],
    ["an env key with =", { env: { "A=B": "x" } }, "env.A=B", /without =/],
    ["65 entries", { metadata: entries(65) }, "metadata", /at most 64 entries/],
    ["10,000 entries", { metadata: entries(10_000) }, "metadata", /at most 64 entries, but has 10000/],
    ["NUL in a value", { metadata: { k: "a\0b" } }, "metadata.k", /NUL/],
    ["NUL in a key", { env: { "a\0b": "x" } }, "env.a\uFFFDb", /NUL/],
    ["NUL in text", { template: "ba\0se" }, "template", /NUL/],
    ["half a surrogate pair", { metadata: { k: "\ud800" } }, "metadata.k", /well-formed/],
    ["an empty template", { template: "" }, "template", /must not be empty/],
    ["an overlong template", { template: "x".repeat(129) }, "template", /at most 128 characters/],
  ])("%s is refused, and the field is named", async (_what, body, field, reason) => {
    const answer = await api.call("POST", "/v1/sandboxes", body);
    expect(answer.status).toBe(400);
    const { code, message, details } = answer.body.error;
    expect(code).toBe("invalid_request");
    expect(details.field).toBe(field);
    expect(details.reason).toMatch(reason);
    expect(message).toBe(`${field} ${details.reason}`);
  });

  test.each<[string, unknown]>([
    ["null", "null"],
    ["an array", "[]"],
    ["a string", '"base"'],
    ["a number", "1"],
    ["true", "true"],
    ["nothing", ""],
  ])("%s is no body", async (_what, body) => {
    const answer = await api.call("POST", "/v1/sandboxes", body, { "content-type": "application/json" });
    expect(answer.status).toBe(400);
    expect(answer.body.error.message).toMatch(/^the body must be an object/);
  });

  test.each<[string, string | Buffer]>([
    ["cut JSON", '{"template":"ba'],
    ["words", "hello"],
    ["a comment", "{/**/}"],
    ["NaN", '{"vcpus":NaN}'],
    ["a bare NUL", '{"template":"a\0b"}'],
    ["two values", "{}{}"],
    ["bytes that are not UTF-8", Buffer.from([0x7b, 0x22, 0xff, 0xfe, 0x22, 0x3a, 0x31, 0x7d])],
    ["nesting that never ends", "[".repeat(500_000)],
    ["half-closed nesting", `${'{"a":'.repeat(100_000)}1`],
  ])("%s is malformed", async (_what, payload) => {
    const answer = await api.call("POST", "/v1/sandboxes", payload, { "content-type": "application/json" });
    expect(answer.status).toBe(400);
    expect(answer.body.error.code).toBe("invalid_request");
    expect(answer.body.error.message).toMatch(/^the body is not /);
  });

  test("deep nesting that is well-formed is refused by its field", async () => {
    const payload = `{"metadata":${'{"a":'.repeat(150_000)}1${"}".repeat(150_000)}}`;
    const answer = await api.call("POST", "/v1/sandboxes", payload, { "content-type": "application/json" });
    expect(answer.body.error.details.field).toBe("metadata.a");
  });

  test.each([
    '{"__proto__":{"vcpus":8}}',
    '{"\\u005f_proto__":{"vcpus":8}}',
    '{"metadata":{"__proto__":"x"}}',
    '{"metadata":{"__proto__":{"polluted":"yes"}}}',
    '{"env":{"_\\u005Fproto__":"x"}}',
  ])("%s does not reach a prototype", async (payload) => {
    const answer = await api.call("POST", "/v1/sandboxes", payload, { "content-type": "application/json" });
    expect(answer.status).toBe(400);
    expect(answer.body.error.details.field).toBe("__proto__");
    expect(({} as Record<string, unknown>)["polluted"]).toBeUndefined();
  });

  test("keys that only look like prototypes are keys like others", async () => {
    const metadata = { constructor: "a", prototype: "b", toString: "c", hasOwnProperty: "d" };
    const { body, status } = await api.call("POST", "/v1/sandboxes", { metadata });
    expect(status).toBe(201);
    expect(body.metadata).toEqual(metadata);
  });

  test("limits are reached exactly", async () => {
    const full = {
      metadata: { ["k".repeat(128)]: "v".repeat(512), ...entries(63) },
      env: { K: "💥".repeat(2048) },
      timeout_sec: 10,
    };
    expect((await api.call("POST", "/v1/sandboxes", full)).status).toBe(201);
    const tooLongKey = { metadata: { ["k".repeat(129)]: "v" } };
    expect((await api.call("POST", "/v1/sandboxes", tooLongKey)).body.error.details.reason).toMatch(
      /at most 128/,
    );
  });

  test("a hundred thousand bad entries cost little and answer little", async () => {
    const payload = `{"metadata":{${Array.from({ length: 100_000 }, (_, i) => `"${i}":0`).join(",")}}}`;
    const answer = await api.call("POST", "/v1/sandboxes", payload, { "content-type": "application/json" });
    expect(answer.status).toBe(400);
    expect(answer.raw.length).toBeLessThan(1000);
  });

  test("several violations are all told, within a bound; the first decides the message", async () => {
    const { error } = (await api.call("POST", "/v1/sandboxes", { vcpus: 3, memory_mb: 1, nope: 1 })).body;
    expect(error.message).toMatch(/^vcpus must be/);
    expect(error.details.violations.map(({ field }: { field: string }) => field)).toEqual([
      "vcpus",
      "memory_mb",
      "nope",
    ]);
    const many = Object.fromEntries(Array.from({ length: 5000 }, (_, i) => [`nope${i}`, 1]));
    expect((await api.call("POST", "/v1/sandboxes", many)).raw.length).toBeLessThan(4000);
    const long = { ["x".repeat(100_000)]: 1 };
    expect((await api.call("POST", "/v1/sandboxes", long)).raw.length).toBeLessThan(2000);
  });
});

describe("bodies of other calls", () => {
  const url = (path: string) => `/v1/sandboxes/${sandbox}${path}`;

  test.each<[string, unknown, string]>([
    ["nothing to run", {}, "cmd"],
    ["an empty command", { cmd: "" }, "cmd"],
    ["NUL in a command", { cmd: "a\0b" }, "cmd"],
    ["a command beyond 128 KiB", { cmd: "x".repeat(131_072) }, "cmd"],
    ["a command beyond 128 KiB in bytes alone", { cmd: "ü".repeat(70_000) }, "cmd"],
    ["NUL in an argument", { cmd: "a", args: ["b", "c\0"] }, "args.1"],
    ["an argument that is no text", { cmd: "a", args: [1] }, "args.0"],
    ["arguments that are no list", { cmd: "a", args: "b" }, "args"],
    ["1,025 arguments", { cmd: "a", args: Array.from({ length: 1025 }, () => "") }, "args"],
    ["a shell that is no boolean", { cmd: "a", shell: "bash" }, "shell"],
    ["an empty directory", { cmd: "a", cwd: "" }, "cwd"],
    ["a directory beyond PATH_MAX", { cmd: "a", cwd: "/".repeat(4096) }, "cwd"],
    ["a user with a colon", { cmd: "a", user: "root:root" }, "user"],
    ["a time-out of nothing", { cmd: "a", timeout_sec: 0 }, "timeout_sec"],
    ["a time-out of days", { cmd: "a", timeout_sec: 86_401 }, "timeout_sec"],
    ["an input that is no text", { cmd: "a", stdin: [1] }, "stdin"],
  ])("exec refuses %s", async (_what, body, field) => {
    const answer = await api.call("POST", url("/exec"), body);
    expect(answer.status).toBe(400);
    expect(answer.body.error.details.field).toBe(field);
  });

  test.each<[string, unknown, string]>([
    ["no path", {}, "path"],
    ["an empty path", { path: "" }, "path"],
    ["NUL in a path", { path: "/a\0b" }, "path"],
    ["an overlong path", { path: `/${"x".repeat(4095)}` }, "path"],
    ["a number", { path: 5 }, "path"],
  ])("files/read refuses %s", async (_what, body, field) => {
    const answer = await api.call("POST", url("/files/read"), body);
    expect(answer.status).toBe(400);
    expect(answer.body.error.details.field).toBe(field);
  });

  test("calls without a body refuse fields that they would have to ignore", async () => {
    for (const [method, path] of [
      ["POST", "/pause"],
      ["POST", "/ping"],
      ["DELETE", ""],
    ] as const) {
      const answer = await api.call(method, url(path), { force: true });
      expect([path, answer.status, answer.body.error?.details.field]).toEqual([path, 400, "force"]);
    }
  });

  test("an empty body with a JSON type is no body, as many clients send it", async () => {
    const answer = await api.call("POST", url("/ping"), "", { "content-type": "application/json" });
    expect(answer.status).toBe(204);
  });

  test.each<[string, object, string]>([
    ["a capital", { sandbox_id: "x", name: "Base" }, "name"],
    ["a path", { sandbox_id: "x", name: "../x" }, "name"],
    ["64 characters", { sandbox_id: "x", name: "x".repeat(64) }, "name"],
    ["no sandbox", { name: "x" }, "sandbox_id"],
  ])("a snapshot's name with %s is refused", async (_what, body, field) => {
    const answer = await api.call("POST", "/v1/snapshots", body);
    expect(answer.body.error.details.field).toBe(field);
  });

  test("a malformed id in a body is an unknown one", async () => {
    const answer = await api.call("POST", "/v1/snapshots", { sandbox_id: "sb", name: "x" });
    expect([answer.status, answer.body.error.code]).toEqual([404, "not_found"]);
  });

  test("names for people have no control characters", async () => {
    for (const name of ["", "a\nb", "a\u0007", "x".repeat(129)]) {
      const answer = await api.call("POST", "/v1/api-keys", { name });
      expect([name, answer.status, answer.body.error?.details.field]).toEqual([name, 400, "name"]);
    }
  });
});

describe("queries and paths", () => {
  test.each([
    ["limit=0", "limit"],
    ["limit=201", "limit"],
    ["limit=-1", "limit"],
    ["limit=1e2", "limit"],
    ["limit=", "limit"],
    ["limit=10&limit=20", "limit"],
    ["cursor=!", "cursor"],
    ["cursor=", "cursor"],
    ["cursor=YQ", "cursor"],
    ["cursor=a&cursor=b", "cursor"],
    ["status=alive", "status"],
    ["status=running,", "status"],
    ["status=running&status=paused", "status"],
    ["metadata.a=1&metadata.a=2", "metadata.a"],
    ["metadata.=1", "metadata."],
    ["metadata.a=%00", "metadata.a"],
    [`metadata.a=${"x".repeat(513)}`, "metadata.a"],
    [Array.from({ length: 17 }, (_, i) => `metadata.k${i}=1`).join("&"), "metadata"],
    ["metadata=1", "metadata"],
    ["order=asc", "order"],
    ["__proto__=1", "__proto__"],
    ["metadata.__proto__=1", "metadata.__proto__"],
  ])("?%s is refused", async (query, field) => {
    const answer = await api.call("GET", `/v1/sandboxes?${query}`);
    expect([answer.status, answer.body.error?.details?.field]).toEqual([400, field]);
  });

  test.each([
    "/v1/sandboxes?metadata.a=%zz",
    "/v1/sandboxes?metadata.a=%",
    "/v1/sandboxes?metadata.a=%ff",
    "/v1/%zz",
  ])("%s is not correctly encoded", async (url) => {
    const answer = await api.call("GET", url);
    expect([answer.status, answer.body.error.code]).toEqual([400, "invalid_request"]);
    expect(answer.body.error.message).toMatch(/percent-encoded/);
  });

  test.each([
    "/",
    "/v1",
    "/v1/",
    "/v1/sandboxes/",
    "/V1/sandboxes",
    "//v1/sandboxes",
    "/v1/nothing",
    "/..%2f..%2fetc",
  ])("what is not there is 404: %s", async (url) => {
    const answer = await api.call("GET", url);
    expect(answer.status).toBe(url === "/" ? 200 : 404);
  });

  test.each([
    ["DELETE", "/v1/sandboxes", "GET, HEAD, OPTIONS, POST"],
    ["PUT", "/v1/sandboxes/sbaaaaaaaaaaaaaaaaaa", "DELETE, GET, HEAD, OPTIONS, PATCH"],
    ["GET", "/v1/sandboxes/x/exec", "OPTIONS, POST"],
    ["POST", "/docs", "GET, HEAD, OPTIONS"],
    ["TRACE", "/healthz", "GET, HEAD, OPTIONS"],
  ] as const)("%s %s is 405 and says what the path takes", async (method, url, allow) => {
    const answer = await api.call(method, url);
    expect([answer.status, answer.body.error.code]).toEqual([405, "method_not_allowed"]);
    expect(answer.headers.allow).toBe(allow);
  });

  test("OPTIONS says what a path takes, and HEAD is GET without a body", async () => {
    const options = await api.app.inject({ method: "OPTIONS", url: "/v1/sandboxes" });
    expect([options.statusCode, options.headers.allow]).toEqual([204, "GET, HEAD, OPTIONS, POST"]);
    expect(options.headers["access-control-allow-origin"]).toBeUndefined();
    const head = await api.call("HEAD", "/v1/sandboxes");
    expect([head.status, head.raw.length]).toEqual([200, 0]);
    const headOfNothing = await api.app.inject({ method: "HEAD", url: "/v1/nothing" });
    expect([headOfNothing.statusCode, headOfNothing.body]).toEqual([404, ""]);
  });
});

describe("content types", () => {
  test.each([
    ["text/plain", "{}"],
    ["application/x-www-form-urlencoded", "template=base"],
    ["multipart/form-data; boundary=x", "--x--"],
    ["application/octet-stream", "{}"],
    ["application/xml", "<a/>"],
    ["nonsense", "{}"],
  ])("%s is 415 where JSON is meant", async (type, payload) => {
    const answer = await api.call("POST", "/v1/sandboxes", payload, { "content-type": type });
    expect([answer.status, answer.body.error.code]).toEqual([415, "unsupported_media_type"]);
  });

  test("JSON is 415 where a file is meant", async () => {
    const answer = await api.call("POST", `/v1/sandboxes/${sandbox}/files/write`, { path: "x" });
    expect(answer.status).toBe(415);
  });

  test("JSON may say its charset; a compressed body is refused", async () => {
    const type = { "content-type": "application/json; charset=utf-8" };
    expect((await api.call("POST", "/v1/sandboxes", "{}", type)).status).toBe(201);
    const packed = await api.call("POST", "/v1/sandboxes", "{}", { ...type, "content-encoding": "gzip" });
    expect(packed.status).toBe(415);
  });
});
