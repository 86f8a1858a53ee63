/** Files in by forms and by bodies, files out; and forms as broken as they come. */
import * as fc from "fast-check";
import { randomBytes } from "node:crypto";
import { afterAll, afterEach, beforeAll, describe, expect, test, vi } from "vitest";
import { openTestApi } from "./testing/test-api.ts";
import type { Answer, TestApi } from "./testing/test-api.ts";

// Machines that run every suite at once are slow.
vi.setConfig({ testTimeout: 60_000 });

const FILE_BYTES = 1024 * 1024;

let api: TestApi;
let sandbox: string;
beforeAll(async () => {
  api = await openTestApi({ limits: { fileBytes: FILE_BYTES, uploadStallMs: 2_000 } });
  sandbox = (await api.call("POST", "/v1/sandboxes", {})).body.id;
});
afterEach(() => {
  expect(api.log.filter(({ level }) => level >= 50)).toEqual([]);
  api.services.files.clear();
});
afterAll(() => api[Symbol.asyncDispose]());

interface Part {
  name?: string;
  value: string | Buffer;
  filename?: string;
  head?: string;
}

const BOUNDARY = "----rookery";

function form(parts: Part[], { boundary = BOUNDARY, end = "--\r\n" } = {}): Buffer {
  const chunks = parts.flatMap(({ name, value, filename, head }) => [
    `--${boundary}\r\n`,
    head ??
      `Content-Disposition: form-data; name="${name}"${filename === undefined ? "" : `; filename="${filename}"`}`,
    "\r\n\r\n",
    value,
    "\r\n",
  ]);
  return Buffer.concat([...chunks, `--${boundary}${end}`].map((chunk) => Buffer.from(chunk)));
}

const write = (
  payload: Buffer | string,
  type = `multipart/form-data; boundary=${BOUNDARY}`,
): Promise<Answer> =>
  api.call("POST", `/v1/sandboxes/${sandbox}/files/write`, payload, { "content-type": type });

const read = (path: string): Promise<Answer> =>
  api.call("POST", `/v1/sandboxes/${sandbox}/files/read`, { path });

const path = (value: string): Part => ({ name: "path", value });
const file = (value: string | Buffer): Part => ({ name: "file", value, filename: "f.bin" });

describe("a file goes in and comes out as it was", () => {
  test.each([0, 1, 65_536, FILE_BYTES])("of %i bytes, by a form", async (bytes) => {
    const content = randomBytes(bytes);
    expect((await write(form([path("/home/user/ä b"), file(content)]))).status).toBe(204);
    const out = await read("/home/user/ä b");
    expect(out.status).toBe(200);
    expect(out.raw.equals(content)).toBe(true);
    expect(out.headers["content-length"]).toBe(String(bytes));
    expect(out.headers["content-type"]).toBe("application/octet-stream");
    expect(out.headers["content-disposition"]).toBe("attachment");
  });

  test("by an octet-stream with its path in the query", async () => {
    const content = randomBytes(100_000);
    const url = `/v1/sandboxes/${sandbox}/files/write?path=${encodeURIComponent("rel/ä&b")}`;
    const { status } = await api.call("POST", url, content, { "content-type": "application/octet-stream" });
    expect(status).toBe(204);
    expect((await read("rel/ä&b")).raw.equals(content)).toBe(true);
  });

  test("whatever it holds: also what looks like the form's own delimiters", async () => {
    const content = Buffer.from(`x--${BOUNDARY}--\n--${BOUNDARY}\r\n--\r\n--${BOUNDARY.slice(1)}--\r\n\r\n`);
    expect((await write(form([path("/x"), file(content)]))).status).toBe(204);
    expect((await read("/x")).raw.equals(content)).toBe(true);
  });

  test("a file part needs no file name, and the form may be followed by an epilogue", async () => {
    expect(
      (await write(form([path("/x"), { name: "file", value: "abc" }], { end: "--\r\nepilogue" }))).status,
    ).toBe(204);
    expect((await read("/x")).raw.toString()).toBe("abc");
  });

  test("by what fetch makes of a FormData", async () => {
    const data = new FormData();
    data.append("path", "/tmp/a");
    data.append("file", new Blob(["hello"]), "any name");
    const request = new Request("http://x", { method: "POST", body: data });
    const { status } = await write(
      Buffer.from(await request.arrayBuffer()),
      request.headers.get("content-type") ?? "",
    );
    expect(status).toBe(204);
    expect((await read("/tmp/a")).raw.toString()).toBe("hello");
  });
});

describe("a form that is wrong is told why, and writes nothing", () => {
  test.each<[string, Buffer | string, string | undefined, RegExp]>([
    ["no parts", form([]), "path", /required/],
    ["no file", form([path("/x")]), "file", /required/],
    ["no path", form([file("a")]), "path", /before file/],
    ["path after file", form([file("a"), path("/x")]), "path", /before file/],
    ["an empty path", form([path(""), file("a")]), "path", /empty/],
    ["NUL in the path", form([path("/a\0b"), file("a")]), "path", /NUL/],
    ["an overlong path", form([path(`/${"x".repeat(4096)}`), file("a")]), "path", /at most 4095/],
    ["an endless path", form([path("x".repeat(100_000)), file("a")]), "path", /too long/],
    ["two paths", form([path("/x"), path("/y")]), "path", /once/],
    ["three parts", form([path("/x"), path("/y"), file("a")]), undefined, /more parts/],
    ["two files", form([path("/x"), file("a"), file("b")]), undefined, /more parts/],
    ["a field of another name", form([{ name: "mode", value: "7" }, file("a")]), "mode", /not a field/],
    [
      "a field after the file",
      form([path("/x"), file("a"), { name: "mode", value: "7" }]),
      undefined,
      /more parts/,
    ],
    [
      "a delimiter in the file",
      form([path("/x"), file(`a\r\n--${BOUNDARY}x\r\nb`)]),
      undefined,
      /more parts|malformed/,
    ],
    ["no end", form([path("/x"), file("a")], { end: "" }), undefined, /malformed or ended early/],
    [
      "half a delimiter",
      form([path("/x"), file("abc")]).subarray(0, -12),
      undefined,
      /malformed or ended early/,
    ],
    ["an end in the headers", `--${BOUNDARY}\r\nContent-Dispo`, undefined, /malformed|required/],
    ["no delimiter at all", "hello", undefined, /malformed|required/],
    ["nothing", "", undefined, /malformed|required/],
    [
      "a part without a disposition",
      form([{ head: "X-A: b", value: "a" }, file("a")]),
      "path",
      /before file/,
    ],
    [
      "another boundary",
      form([path("/x"), file("a")], { boundary: "other" }),
      undefined,
      /malformed|required/,
    ],
  ])("%s", async (_what, payload, field, reason) => {
    const { status, body } = await write(payload);
    expect([status, body.error.code]).toEqual([400, "invalid_request"]);
    if (field !== undefined) expect(body.error.details.field).toBe(field);
    expect(body.error.message).toMatch(reason);
    expect([...api.services.files.keys()]).toEqual([]);
  });

  test.each(["multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary"])(
    "no boundary in %s",
    async (type) => {
      const { status } = await write(form([path("/x"), file("a")]), type);
      expect([400, 415]).toContain(status);
    },
  );

  test("a file that is too big is 413, also when nothing said so before", async () => {
    const tooBig = await write(form([path("/x"), file(Buffer.alloc(FILE_BYTES + 1))]));
    expect([tooBig.status, tooBig.body.error.code]).toEqual([413, "payload_too_large"]);
    const url = `/v1/sandboxes/${sandbox}/files/write?path=/x`;
    const octets = { "content-type": "application/octet-stream" };
    expect((await api.call("POST", url, Buffer.alloc(FILE_BYTES + 1), octets)).status).toBe(413);
    expect(api.services.files.size).toBe(0);
  });

  test("an octet-stream needs a path", async () => {
    const answer = await write("abc", "application/octet-stream");
    expect([answer.status, answer.body.error.details.field]).toEqual([400, "path"]);
  });

  test("whatever bytes are sent as a form, the answer is 204 or a 400, and a file only on 204", async () => {
    const valid = form([path("/x"), file("some content")]);
    const broken = fc.oneof(
      fc.uint8Array({ maxLength: 400 }).map((bytes) => Buffer.from(bytes)),
      // One that is right, hurt in a few places.
      fc
        .array(fc.tuple(fc.nat(valid.length - 1), fc.nat(255)), { minLength: 1, maxLength: 6 })
        .map((changes) => {
          const hurt = Buffer.from(valid);
          for (const [at, byte] of changes) hurt[at] = byte;
          return hurt;
        }),
      fc.nat(valid.length).map((length) => valid.subarray(0, length)),
      fc
        .tuple(fc.nat(valid.length), fc.nat(valid.length))
        .map(([a, b]) => Buffer.concat([valid.subarray(0, a), valid.subarray(b)])),
      fc
        .array(
          fc.constantFrom(
            `--${BOUNDARY}`,
            "--",
            "\r\n",
            "\n",
            "Content-Disposition: form-data",
            '; name="path"',
            "; name=file",
            ":",
            "\0",
            "/x",
          ),
          { maxLength: 30 },
        )
        .map((words) => Buffer.from(words.join(""))),
    );
    await fc.assert(
      fc.asyncProperty(broken, async (payload) => {
        api.services.files.clear();
        const { status } = await write(payload);
        expect([204, 400]).toContain(status);
        expect(api.services.files.size).toBe(status === 204 ? 1 : 0);
      }),
      { numRuns: 400 },
    );
  });
});

describe("the sandbox's own refusals", () => {
  test("a missing file is 404, a paused sandbox 409, a broken guest 502, before any byte went out", async () => {
    expect((await read("/nothing")).body.error.code).toBe("file_not_found");
    const spy = vi.spyOn(api.services, "readFile").mockImplementation(async () => ({
      sizeBytes: 5,
      content: {
        [Symbol.asyncIterator]: () => ({
          next: async () => ({ done: true, value: undefined }),
        }),
      },
    }));
    const lied = await read("/x");
    expect([lied.status, lied.body.error.code]).toEqual([502, "guest_error"]);
    spy.mockRestore();
    await api.call("POST", `/v1/sandboxes/${sandbox}/pause`);
    expect((await read("/x")).body.error.code).toBe("wrong_state");
    expect((await write(form([path("/x"), file("a")]))).body.error.code).toBe("wrong_state");
    await api.call("POST", `/v1/sandboxes/${sandbox}/resume`);
    api.log.length = 0;
  });
});
