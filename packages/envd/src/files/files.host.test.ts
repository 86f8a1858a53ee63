import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { createHash, randomBytes } from "node:crypto";
import {
  chmodSync,
  existsSync,
  linkSync,
  mkdirSync,
  readFileSync,
  readdirSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { request as httpRequest } from "node:http";
import { join } from "node:path";
import { gunzipSync, gzipSync } from "node:zlib";
import { afterAll, beforeAll, describe, test, vi } from "vitest";
import { ACCESS_TOKEN, EnvdProcess } from "../testing/envd-process.ts";
import { signatureOf } from "./signature.ts";

let envd: EnvdProcess;
let folder: string;
beforeAll(async () => {
  envd = await EnvdProcess.start();
  assert.equal((await envd.init()).status, 204);
  folder = join(envd.directory, "files");
  mkdirSync(folder);
  chmodSync(envd.directory, 0o755);
});
afterAll(async () => {
  envd.assertAlive();
  await envd[Symbol.asyncDispose]();
});

const url = (query: Record<string, string>) => `/files?${new URLSearchParams(query).toString()}`;
const octets = { "content-type": "application/octet-stream" };
const identity = { "accept-encoding": "identity" };

async function put(
  path: string,
  body: string | Uint8Array<ArrayBuffer>,
  headers: Record<string, string> = {},
): Promise<Response> {
  return envd.fetch(url({ path }), { method: "POST", headers: { ...octets, ...headers }, body });
}

async function answerOf(response: Response): Promise<{ status: number; message: string }> {
  const { code, message } = (await response.json()) as { code: number; message: string };
  assert.equal(code, response.status);
  return { status: response.status, message };
}

describe("POST /files", () => {
  test("makes parents, owner and mode, and answers with the entry", async () => {
    const path = join(folder, "a/b/c.txt");
    const answer = await put(path, "hello");
    assert.equal(answer.status, 200);
    assert.deepEqual(await answer.json(), [{ path, name: "c.txt", type: "file" }]);
    assert.equal(readFileSync(path, "utf8"), "hello");
    for (const [made, mode] of [
      [join(folder, "a"), 0o755],
      [path, 0o644],
    ] as const) {
      const stat = statSync(made);
      assert.deepEqual([stat.uid, stat.gid, stat.mode & 0o7777], [65_534, 65_534, mode]);
    }
  });

  test("replaces a file and keeps its mode, its link and its other names", async () => {
    const path = join(folder, "script");
    writeFileSync(path, "old content", { mode: 0o755 });
    const link = join(folder, "link");
    symlinkSync(path, link);
    assert.equal((await put(link, "new")).status, 200);
    assert.equal(readFileSync(path, "utf8"), "new");
    assert.equal(statSync(path).mode & 0o777, 0o755);
    const twin = join(folder, "twin");
    linkSync(path, twin);
    assert.equal((await put(path, "both")).status, 200);
    assert.equal(readFileSync(twin, "utf8"), "both");
  });

  test("takes gzip, chunks and nothing", async () => {
    const path = join(folder, "coded");
    const content = randomBytes(300_000);
    assert.equal((await put(path, gzipSync(content), { "content-encoding": "gzip" })).status, 200);
    assert.deepEqual(readFileSync(path), content);
    const stream = new ReadableStream({
      start(controller) {
        for (let i = 0; i < 300; i += 1) controller.enqueue(content.subarray(1000 * i, 1000 * (i + 1)));
        controller.close();
      },
    });
    const chunked = await envd.fetch(url({ path }), {
      method: "POST",
      headers: octets,
      body: stream,
      duplex: "half",
    });
    assert.equal(chunked.status, 200);
    assert.deepEqual(readFileSync(path), content);
    assert.equal((await put(path, "")).status, 200);
    assert.equal(readFileSync(path).byteLength, 0);
  });

  test("takes several files as multipart, each at its file name or all at the query's path", async () => {
    const form = new FormData();
    form.append("ignored", "field");
    form.append("file", new Blob(["one"]), join(folder, "m/one"));
    form.append("file", new Blob([randomBytes(200_000)]), join(folder, "m/two"));
    const answer = await envd.fetch("/files", { method: "POST", body: form });
    assert.equal(answer.status, 200);
    assert.deepEqual(
      ((await answer.json()) as { name: string }[]).map(({ name }) => name),
      ["one", "two"],
    );
    assert.equal(readFileSync(join(folder, "m/one"), "utf8"), "one");
    assert.equal(statSync(join(folder, "m/two")).size, 200_000);

    const single = new FormData();
    single.append("file", new Blob(["by query"]), "whatever");
    const byQuery = await envd.fetch(url({ path: join(folder, "m/q") }), { method: "POST", body: single });
    assert.equal(byQuery.status, 200);
    assert.equal(readFileSync(join(folder, "m/q"), "utf8"), "by query");
  });

  test("keeps metadata as attributes, and an overwrite without any drops them", async () => {
    const path = join(folder, "described");
    const answer = await put(path, "x", { "X-Metadata-Author": "me", "x-metadata-kind": "a b" });
    assert.equal(answer.status, 200);
    assert.deepEqual(await answer.json(), [
      { path, name: "described", type: "file", metadata: { author: "me", kind: "a b" } },
    ]);
    const metadata = async () => {
      const stat = await envd.fetch("/filesystem.Filesystem/Stat", {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: JSON.stringify({ path }),
      });
      return ((await stat.json()) as { entry: { metadata?: unknown } }).entry.metadata;
    };
    assert.deepEqual(await metadata(), { author: "me", kind: "a b" });
    assert.equal((await put(path, "y")).status, 200);
    assert.equal(await metadata(), undefined);
    assert.equal((await put(path, "z", { "x-metadata-big": "x".repeat(5000) })).status, 400);
  });

  test("says what is wrong with a request, and does not touch the file", async () => {
    const path = join(folder, "kept");
    writeFileSync(path, "kept");
    const cases: [Promise<Response>, number, RegExp][] = [
      [put(folder, "x"), 400, /^path is a directory: /],
      [put(join(path, "below"), "x"), 400, /file/],
      [put("a\0b", "x"), 400, /NUL/],
      [put("~other/x", "x"), 400, /user-specific home/],
      [put(`/${"x".repeat(5000)}`, "x"), 400, /longer than/],
      [put(`/tmp/${"x".repeat(300)}`, "x"), 400, /name too long/],
      [put(path, "not gzip", { "content-encoding": "gzip" }), 400, /decompress/],
      [put(path, "x", { "content-encoding": "br" }), 400, /unsupported Content-Encoding/],
      [put(path, "x", { "content-type": "text/plain" }), 400, /unsupported content type/],
      [put(path, "x", { "content-type": "multipart/form-data" }), 400, /Boundary/],
      [put(path, "--b\r\nbroken", { "content-type": "multipart/form-data; boundary=b" }), 400, /form/],
      [envd.fetch("/files", { method: "POST", headers: octets, body: "x" }), 400, /path query parameter/],
      [
        envd.fetch(url({ path, username: "no-one" }), { method: "POST", headers: octets, body: "x" }),
        401,
        /error looking up user 'no-one'/,
      ],
    ];
    for (const [promise, status, message] of cases) {
      const answer = await answerOf(await promise);
      assert.equal(answer.status, status, answer.message);
      assert.match(answer.message, message);
    }
    assert.equal(readFileSync(path, "utf8"), "kept");
    assert.deepEqual(leftovers(), []);
  });

  test("a part that is cut off leaves nothing behind", async () => {
    const path = join(folder, "cut");
    const head = `--b\r\nContent-Disposition: form-data; name="file"; filename="${path}"\r\n\r\n`;
    const answer = await put(path, `${head}half`, { "content-type": "multipart/form-data; boundary=b" });
    assert.match((await answerOf(answer)).message, /unexpected end/i);
    assert.ok(!existsSync(path));
    assert.deepEqual(leftovers(), []);
  });

  test("two parts for one path are refused after the first", async () => {
    const path = join(folder, "same");
    const form = new FormData();
    for (const content of ["first", "second"]) form.append("file", new Blob([content]), path);
    const answer = await envd.fetch("/files", { method: "POST", body: form });
    assert.match((await answerOf(answer)).message, /cannot upload multiple files to the same path/);
    assert.equal(readFileSync(path, "utf8"), "first");
  });

  test("a full disk is a 507, the old file stays whole, and the answer is readable", async () => {
    const small = join(folder, "small");
    mkdirSync(small);
    // envd has a mount namespace of its own; the disk is made where it is seen.
    execFileSync("nsenter", [
      "-t",
      String(envd.pid),
      "-m",
      "mount",
      "-t",
      "tmpfs",
      "-o",
      "size=1m",
      "t",
      small,
    ]);
    const path = join(small, "file");
    assert.equal((await put(path, "old")).status, 200);
    const body = randomBytes(8_000_000);
    const answer = await answerOf(await put(path, body));
    assert.deepEqual(answer, {
      status: 507,
      message: "attempted to write 8000000 bytes: not enough disk space available",
    });
    const read = await envd.fetch(url({ path }));
    assert.equal(await read.text(), "old");
  });

  test("a client that breaks off leaves the old file and no other", async () => {
    const path = join(folder, "broken-off");
    writeFileSync(path, "old");
    await new Promise<void>((resolve) => {
      const request = httpRequest(`${envd.url}${url({ path })}`, {
        method: "POST",
        headers: { ...octets, "x-access-token": ACCESS_TOKEN, "content-length": "1000000" },
      });
      request.on("error", () => resolve());
      request.write(randomBytes(600_000), () => request.destroy());
    });
    // The next request on another connection comes after envd has seen the end of this one.
    await vi.waitFor(() => assert.deepEqual(leftovers(), []));
    assert.equal(readFileSync(path, "utf8"), "old");
  });

  function leftovers(): string[] {
    return readdirSync(folder, { recursive: true })
      .map(String)
      .filter((name) => name.includes(".rookery-upload-"));
  }
});

describe("GET /files", () => {
  test("gives bytes, length and nothing more than asked for", async () => {
    const path = join(folder, "ranges");
    writeFileSync(path, "0123456789");
    const get = (headers: Record<string, string> = {}) =>
      envd.fetch(url({ path }), { headers: { ...identity, ...headers } });
    const whole = await get();
    assert.deepEqual([whole.status, whole.headers.get("content-length")], [200, "10"]);
    assert.equal(await whole.text(), "0123456789");
    for (const [range, expected, contentRange] of [
      ["bytes=2-4", "234", "bytes 2-4/10"],
      ["bytes=7-", "789", "bytes 7-9/10"],
      ["bytes=-3", "789", "bytes 7-9/10"],
      ["bytes=8-100", "89", "bytes 8-9/10"],
    ] as const) {
      const part = await get({ range });
      assert.deepEqual(
        [part.status, part.headers.get("content-range"), await part.text()],
        [206, contentRange, expected],
      );
    }
    const beyond = await get({ range: "bytes=10-" });
    assert.deepEqual([beyond.status, beyond.headers.get("content-range")], [416, "bytes */10"]);
    const since = await get({ "if-modified-since": whole.headers.get("last-modified")! });
    assert.equal(since.status, 304);
  });

  test("compresses when asked to, and refuses a coding that it lacks", async () => {
    const path = join(folder, "text");
    writeFileSync(path, "x".repeat(100_000));
    const coded = await raw(path, { "accept-encoding": "gzip" });
    assert.equal(coded.headers["content-encoding"], "gzip");
    assert.ok(coded.body.byteLength < 2000);
    assert.equal(gunzipSync(coded.body).toString(), "x".repeat(100_000));
    assert.equal((await raw(path, { "accept-encoding": "br, identity;q=0" })).status, 406);
  });

  test("an empty file has length 0, and a file of /proc its content", async () => {
    const path = join(folder, "empty");
    writeFileSync(path, "");
    const empty = await envd.fetch(url({ path }));
    assert.deepEqual([empty.status, empty.headers.get("content-length")], [200, "0"]);
    const proc = await envd.fetch(url({ path: "/proc/sys/kernel/ostype" }), { headers: identity });
    assert.equal(await proc.text(), "Linux\n");
  });

  test("what is no readable file is said in the words of the protocol", async () => {
    const fifo = join(folder, "fifo");
    execFileSync("mkfifo", [fifo]);
    const cases: [string, number, string][] = [
      ["/no/such", 404, "path '/no/such' does not exist"],
      [folder, 400, `path '${folder}' is a directory`],
      [fifo, 400, `path '${fifo}' is not a regular file`],
      ["a\0", 400, "error resolving path: path holds a NUL byte"],
    ];
    for (const [path, status, message] of cases) {
      assert.deepEqual(await answerOf(await envd.fetch(url({ path }))), { status, message });
    }
  });

  test("a signature stands for the token, and only for what it was made for", async () => {
    const path = join(folder, "signed");
    writeFileSync(path, "secret");
    const fetchSigned = (query: Record<string, string>) => fetch(envd.url + url(query));
    const sign = (expiration?: string, operation: "read" | "write" = "read") =>
      signatureOf({ path, operation, username: "root", expiration }, ACCESS_TOKEN);
    const base = { path, username: "root" };
    const later = String(Math.floor(Date.now() / 1000) + 60);
    const good = await fetchSigned({ ...base, signature: sign() });
    assert.equal(await good.text(), "secret");
    const timed = await fetchSigned({ ...base, signature: sign(later), signature_expiration: later });
    assert.equal(timed.status, 200);
    for (const [query, message] of [
      [base, "missing signature query parameter"],
      [{ ...base, signature: sign(undefined, "write") }, "invalid signature"],
      [{ ...base, signature: sign(), path: "/etc/shadow" }, "invalid signature"],
      [{ ...base, signature: sign(later) }, "invalid signature"],
      [{ ...base, signature: sign("1"), signature_expiration: "1" }, "signature is already expired"],
    ] as const) {
      assert.deepEqual(await answerOf(await fetchSigned(query)), { status: 401, message });
    }
    const wrongToken = await fetch(envd.url + url({ ...base, signature: sign() }), {
      headers: { "x-access-token": "wrong" },
    });
    assert.equal((await answerOf(wrongToken)).message, "access token present in header but does not match");
  });
});

test("50 MB go up and come down whole", async () => {
  const path = join(folder, "large");
  const content = randomBytes(50_000_000);
  const upAt = performance.now();
  assert.equal((await put(path, content)).status, 200);
  const downAt = performance.now();
  const answer = await envd.fetch(url({ path }), { headers: identity });
  const hash = createHash("sha256");
  for await (const chunk of answer.body!) hash.update(chunk);
  const endAt = performance.now();
  assert.equal(hash.digest("hex"), createHash("sha256").update(content).digest("hex"));
  const speed = (ms: number) => (50_000 / ms).toFixed(0);
  console.log(`up ${speed(downAt - upAt)} MB/s, down ${speed(endAt - downAt)} MB/s`);
});

/** fetch decodes bodies by itself; this does not. */
function raw(
  path: string,
  headers: Record<string, string>,
): Promise<{ status: number; headers: Record<string, unknown>; body: Buffer }> {
  return new Promise((resolve, reject) => {
    const all = { ...headers, "x-access-token": ACCESS_TOKEN };
    const request = httpRequest(envd.url + url({ path }), { headers: all }, (response) => {
      const chunks: Buffer[] = [];
      response.on("data", (chunk: Buffer) => chunks.push(chunk));
      response.on("end", () =>
        resolve({ status: response.statusCode!, headers: response.headers, body: Buffer.concat(chunks) }),
      );
    });
    request.on("error", reject);
    request.end();
  });
}
