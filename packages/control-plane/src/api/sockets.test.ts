/** What only real connections show: early answers, bounds in time, ends in the middle. */
import { afterAll, beforeAll, describe, expect, test, vi } from "vitest";
import { output } from "./testing/fake-services.ts";
import { listen, RawConnection, requestHead } from "./testing/raw-http.ts";
import { openTestApi } from "./testing/test-api.ts";
import type { TestApi } from "./testing/test-api.ts";

// Machines that run every suite at once are slow.
vi.setConfig({ testTimeout: 60_000 });

let api: TestApi;
let port: number;
let sandbox: string;
let key: Record<string, string>;
beforeAll(async () => {
  api = await openTestApi({
    limits: { headersTimeoutMs: 400, bodyTimeoutMs: 300, uploadStallMs: 300, fileBytes: 1024 * 1024 },
  });
  port = await listen(api.app);
  key = { "x-api-key": api.services.keys.member };
  sandbox = (await api.call("POST", "/v1/sandboxes", {})).body.id;
});
afterAll(() => api[Symbol.asyncDispose]());

const json = { "content-type": "application/json" };
const zeros = Buffer.alloc(64 * 1024, "0");

/** Sends until told that nobody reads, at most `bytes`. */
async function pour(
  connection: RawConnection,
  bytes: number,
  wrap = (chunk: Buffer): Buffer => chunk,
): Promise<number> {
  let sent = 0;
  while (sent < bytes && (await connection.send(wrap(zeros)))) sent += zeros.length;
  return sent;
}

const asChunk = (chunk: Buffer): Buffer =>
  Buffer.concat([Buffer.from(`${chunk.length.toString(16)}\r\n`), chunk, Buffer.from("\r\n")]);

describe("a body that is too big", () => {
  test.each<[string, Record<string, string | number>, (chunk: Buffer) => Buffer]>([
    ["says so at first", { "content-length": 1024 ** 3 }, (chunk) => chunk],
    ["comes in chunks", { "transfer-encoding": "chunked" }, asChunk],
  ])("and %s is refused early, whole and cleanly", async (_how, framing, wrap) => {
    const before = process.memoryUsage().rss;
    using connection = new RawConnection(port);
    await connection.send(requestHead("POST", "/v1/sandboxes", { ...key, ...json, ...framing }));
    const pouring = pour(connection, 1024 ** 3, wrap);
    const { status, head, body } = await connection.whole();
    const sent = await pouring;
    expect(status).toBe(413);
    expect(head).toMatch(/^connection: close/im);
    expect(JSON.parse(body).error).toMatchObject({
      code: "payload_too_large",
      details: { limit_bytes: 1048576 },
    });
    // It was thrown away for a while, so that the answer wasn't lost to a reset; but not all of it.
    expect(sent).toBeLessThan(200 * 1024 * 1024);
    expect(process.memoryUsage().rss - before).toBeLessThan(150 * 1024 * 1024);
  });

  test("is refused unread as a file too, and by whoever has no key", async () => {
    for (const [headers, status] of [
      [key, 413],
      [{ "x-api-key": "rk_no" }, 401],
    ] as const) {
      using connection = new RawConnection(port);
      await connection.send(
        requestHead("POST", `/v1/sandboxes/${sandbox}/files/write?path=x`, {
          ...headers,
          "content-type": "application/octet-stream",
          "content-length": 1024 ** 3,
        }),
      );
      const pouring = pour(connection, 1024 ** 3);
      expect((await connection.whole()).status).toBe(status);
      expect(await pouring).toBeLessThan(200 * 1024 * 1024);
    }
  });
});

describe("slow and broken callers", () => {
  test("headers that never end are ended by us", async () => {
    using connection = new RawConnection(port);
    await connection.send("GET /healthz HTTP/1.1\r\nhost: x\r\n");
    const drip = setInterval(() => void connection.send("x-a: b\r\n"), 50);
    const { status, body } = await connection.whole();
    clearInterval(drip);
    expect([status, JSON.parse(body).error.code]).toEqual([400, "invalid_request"]);
  });

  test("a body that never ends is ended by us", async () => {
    using connection = new RawConnection(port);
    await connection.send(requestHead("POST", "/v1/sandboxes", { ...key, ...json, "content-length": 1000 }));
    const drip = setInterval(() => void connection.send(" "), 50);
    const { status, body } = await connection.answer();
    clearInterval(drip);
    expect([status, JSON.parse(body).error.message]).toEqual([400, "the body did not arrive in time"]);
  });

  test.each([
    ["headers beyond 16 KiB", `GET / HTTP/1.1\r\nhost: x\r\nx-big: ${"x".repeat(20_000)}\r\n\r\n`],
    ["ten thousand headers", `GET / HTTP/1.1\r\nhost: x\r\n${"a: b\r\n".repeat(10_000)}\r\n`],
    ["a URL beyond 16 KiB", `GET /${"x".repeat(20_000)} HTTP/1.1\r\nhost: x\r\n\r\n`],
    ["no HTTP at all", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"],
    ["two lengths", "POST /v1/teams HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab"],
    [
      "a length and chunks",
      "POST /v1/teams HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
    ["NUL in a header", "GET / HTTP/1.1\r\nhost: x\r\nx-a: a\0b\r\n\r\n"],
  ])("%s get a 400 in JSON and an end", async (_what, text) => {
    using connection = new RawConnection(port);
    await connection.send(text);
    const { status, head, body } = await connection.whole();
    expect([status, JSON.parse(body).error.code]).toEqual([400, "invalid_request"]);
    expect(head).toMatch(/^connection: close/im);
    expect(body).not.toMatch(/node:|\.ts|HPE_/);
  });

  test("many requests on one connection are answered in order", async () => {
    using connection = new RawConnection(port);
    const ping = requestHead("GET", "/healthz", {});
    const last = requestHead("GET", "/v1/nothing", { connection: "close" });
    await connection.send(ping.repeat(50) + last);
    await connection.whole();
    expect(connection.text.match(/HTTP\/1\.1 \d+/g)).toEqual([
      ...Array.from({ length: 50 }, () => "HTTP/1.1 200"),
      "HTTP/1.1 404",
    ]);
  });
});

describe("ends in the middle", () => {
  test("a caller who goes away ends his command", async () => {
    const begun = Promise.withResolvers<void>();
    const ended = Promise.withResolvers<unknown>();
    api.services.onExec = async (_input, signal) => {
      signal.addEventListener("abort", () => ended.resolve(signal.reason));
      begun.resolve();
      await ended.promise;
      throw signal.reason;
    };
    const connection = new RawConnection(port);
    const body = JSON.stringify({ cmd: "sleep" });
    const head = { ...key, ...json, "content-length": body.length };
    await connection.send(requestHead("POST", `/v1/sandboxes/${sandbox}/exec`, head) + body);
    await begun.promise;
    connection.socket.destroy();
    expect(await ended.promise).toMatchObject({ name: "ClientGone" });
    api.services.onExec = async () => output({});
    expect(api.log.filter(({ level }) => level >= 50)).toEqual([]);
  });

  test("an upload that tears leaves no file", async () => {
    for (const [type, begin] of [
      ["application/octet-stream", ""],
      ["multipart/form-data; boundary=b", part("path", "/torn") + partHead("file")],
    ] as const) {
      const seen = Promise.withResolvers<void>();
      const settled = Promise.withResolvers<unknown>();
      const spy = vi
        .spyOn(api.services, "writeFile")
        .mockImplementation(async (_caller, _id, _path, content) => {
          try {
            for await (const chunk of content) if (chunk.byteLength > 0) seen.resolve();
            settled.resolve(undefined);
          } catch (error) {
            settled.resolve(error);
            throw error;
          }
        });
      const connection = new RawConnection(port);
      await connection.send(
        requestHead("POST", `/v1/sandboxes/${sandbox}/files/write${begin === "" ? "?path=/torn" : ""}`, {
          ...key,
          "content-type": type,
          "content-length": 500_000,
        }) + begin,
      );
      await connection.send(Buffer.alloc(100_000));
      await seen.promise;
      connection.socket.destroy();
      expect(await settled.promise).toMatchObject({ code: "invalid_request" });
      spy.mockRestore();
    }
  });

  test("an upload that stalls is ended by us", async () => {
    for (const type of ["application/octet-stream", "multipart/form-data; boundary=b"]) {
      using connection = new RawConnection(port);
      await connection.send(
        requestHead("POST", `/v1/sandboxes/${sandbox}/files/write?path=/slow`, {
          ...key,
          "content-type": type,
          "content-length": 500_000,
        }),
      );
      const { status, body } = await connection.answer();
      expect([type, status, JSON.parse(body).error.message]).toEqual([
        type,
        400,
        expect.stringMatching(/brought nothing for 300 ms|path is required in/),
      ]);
    }
  });

  test("a refusal in the middle of an upload still reaches the caller", async () => {
    using connection = new RawConnection(port);
    const head = { ...key, "content-type": "application/octet-stream", "content-length": 1_000_000 };
    await connection.send(requestHead("POST", "/v1/sandboxes/sbaaaaaaaaaaaaaaaaaa/files/write?path=x", head));
    const pouring = pour(connection, 900_000);
    const { status, head: answered } = await connection.answer();
    await pouring;
    expect(status).toBe(404);
    expect(answered).toMatch(/^connection: close/im);
  });

  test("a file that breaks off in the middle closes the connection before its end", async () => {
    for (const lie of [
      { sizeBytes: 200_000, breaks: true },
      { sizeBytes: 200_000, breaks: false },
      { sizeBytes: 50_000, breaks: false },
      { sizeBytes: undefined, breaks: true },
    ]) {
      const spy = vi.spyOn(api.services, "readFile").mockImplementation(async () => ({
        sizeBytes: lie.sizeBytes,
        content: (async function* () {
          yield Buffer.alloc(100_000, "a");
          if (lie.breaks) throw new Error("the guest is gone");
        })(),
      }));
      using connection = new RawConnection(port);
      const body = JSON.stringify({ path: "/x" });
      await connection.send(
        requestHead("POST", `/v1/sandboxes/${sandbox}/files/read`, {
          ...key,
          ...json,
          connection: "close",
          "content-length": body.length,
        }) + body,
      );
      const answer = await connection.whole();
      // Nothing came, or a refusal, or less than was promised: a client can't take it for whole.
      if (!Number.isNaN(answer.status) && answer.status !== 502) {
        expect(answer.status).toBe(200);
        if (lie.sizeBytes !== undefined) expect(answer.body.length).toBeLessThan(lie.sizeBytes);
        expect(answer.body).not.toMatch(/\r\n0\r\n\r\n$/);
      }
      spy.mockRestore();
    }
  });
});

test("hundreds of calls at once are all answered", async () => {
  // With the real limits: here caller and server share a thread, and 300 ms are over soon.
  await using busy = await openTestApi();
  const at = await listen(busy.app);
  const { id } = (await busy.call("POST", "/v1/sandboxes", {})).body;
  busy.services.onExec = async ({ cmd }) => output({ stdout: cmd });
  const answers = await Promise.all(
    Array.from({ length: 200 }, async (_, i) => {
      const response = await fetch(`http://127.0.0.1:${at}/v1/sandboxes/${id}/exec`, {
        method: "POST",
        headers: { "x-api-key": busy.services.keys.member, ...json },
        body: JSON.stringify({ cmd: `c${i}` }),
      });
      return response.json();
    }),
  );
  expect(answers).toMatchObject(Array.from({ length: 200 }, (_, i) => ({ stdout: `c${i}` })));
});

test("while it shuts down it says so, and lets go of idle connections", async () => {
  await using closing = await openTestApi();
  const at = await listen(closing.app);
  const begun = Promise.withResolvers<void>();
  const release = Promise.withResolvers<void>();
  closing.services.onExec = async () => {
    begun.resolve();
    await release.promise;
    return output({ stdout: "done" });
  };
  const id = (await closing.call("POST", "/v1/sandboxes", {})).body.id;
  using connection = new RawConnection(at);
  const body = JSON.stringify({ cmd: "x" });
  const head = { "x-api-key": closing.services.keys.member, ...json, "content-length": body.length };
  await connection.send(requestHead("POST", `/v1/sandboxes/${id}/exec`, head) + body);
  await begun.promise;
  const closed = closing.app.close();
  await vi.waitUntil(() => !closing.app.server.listening);
  await connection.send(requestHead("GET", "/healthz", {}));
  release.resolve();
  const answer = await connection.whole();
  await closed;
  expect(answer.status).toBe(200);
  expect(answer.body).toMatch(/"stdout":"done"/);
});

function partHead(name: string): string {
  return `--b\r\nContent-Disposition: form-data; name="${name}"; filename="f"\r\n\r\n`;
}

function part(name: string, value: string): string {
  return `--b\r\nContent-Disposition: form-data; name="${name}"\r\n\r\n${value}\r\n`;
}

describe("a server that can wait no longer", () => {
  test("tells whoever waits for an answer, and then ends", async () => {
    const ending = await openTestApi();
    const endingPort = await listen(ending.app);
    const made = await ending.call("POST", "/v1/sandboxes", {});
    const arrived = Promise.withResolvers<void>();
    const never = Promise.withResolvers<never>();
    ending.services.onExec = () => {
      arrived.resolve();
      return never.promise;
    };
    const waiting = fetch(`http://127.0.0.1:${endingPort}/v1/sandboxes/${made.body.id}/exec`, {
      method: "POST",
      headers: { ...json, "x-api-key": ending.services.keys.member },
      body: JSON.stringify({ cmd: "sleep" }),
    });
    await arrived.promise;
    const closing = ending[Symbol.asyncDispose]();
    ending.app.cutShort();
    const response = await waiting;
    expect([response.status, response.headers.get("retry-after")]).toEqual([503, "5"]);
    expect(((await response.json()) as { error: object }).error).toMatchObject({ code: "unavailable" });
    await closing;
  });
});
