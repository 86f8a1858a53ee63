/**
 * Against a server of the S3 protocol, behind a proxy that checks every
 * signature (the server itself takes any) and can cut what passes through it.
 */
import assert from "node:assert/strict";
import { createHash, createHmac, timingSafeEqual } from "node:crypto";
import { createServer, request, type IncomingMessage, type Server } from "node:http";
import type { AddressInfo } from "node:net";
import { inspect } from "node:util";
import { startFauxqs, type FauxqsServer } from "fauxqs";
import { afterAll, afterEach, beforeAll, test } from "vitest";
import { objectStoreContract, pieces, read } from "./object-store.contract.ts";
import { S3Store, type S3Options } from "./s3.ts";

const KEY_ID = "AKIDTESTKEY";
const SECRET = "a-secret/that+is=never-shown";
const { signal } = new AbortController();

let backend: FauxqsServer;
let proxy: Server;
/** What the proxy does to a request instead of passing it on; undefined: nothing. */
let trouble:
  | ((incoming: IncomingMessage) => "drop" | "hang" | "busy" | { cutAfter: number } | undefined)
  | undefined;

beforeAll(async () => {
  backend = await startFauxqs({ port: 0, logger: false });
  backend.createBucket("bucket");
  proxy = createServer((incoming, outgoing) => {
    if (!isSigned(incoming)) {
      outgoing.writeHead(403, { "content-type": "application/xml" });
      outgoing.end("<Error><Code>SignatureDoesNotMatch</Code><Message>no</Message></Error>");
      return;
    }
    const what = trouble?.(incoming);
    if (what === "hang") return;
    if (what === "drop") {
      incoming.socket.destroy();
      return;
    }
    if (what === "busy") {
      incoming.resume();
      outgoing.writeHead(503, { "content-type": "application/xml" });
      outgoing.end("<Error><Code>SlowDown</Code><Message>later</Message></Error>");
      return;
    }
    const { method, url, headers } = incoming;
    const passed = request(
      { host: "127.0.0.1", port: backend.port, method, path: url, headers, agent: false },
      (answer) => {
        outgoing.writeHead(answer.statusCode!, answer.headers);
        if (what === undefined) {
          answer.pipe(outgoing);
          return;
        }
        let sent = 0;
        answer.on("data", (piece: Buffer) => {
          const left = what.cutAfter - sent;
          sent += piece.length;
          if (sent < what.cutAfter) outgoing.write(piece);
          else outgoing.write(piece.subarray(0, Math.max(left, 0)), () => outgoing.destroy());
        });
      },
    );
    passed.on("error", () => outgoing.destroy());
    incoming.pipe(passed);
  });
  await new Promise<void>((resolve) => proxy.listen(0, "127.0.0.1", resolve));
});
afterEach(() => {
  trouble = undefined;
});
afterAll(async () => {
  proxy.closeAllConnections();
  await new Promise((resolve) => proxy.close(resolve));
  await backend.stop();
});

function openStore(changes: Partial<S3Options> = {}): S3Store {
  return new S3Store({
    bucket: "bucket",
    prefix: "",
    region: "us-east-1",
    endpoint: `http://127.0.0.1:${(proxy.address() as AddressInfo).port}`,
    credentials: { accessKeyId: KEY_ID, secretAccessKey: SECRET },
    partBytes: 5 << 20,
    ...changes,
  });
}

objectStoreContract("S3", (name) => openStore({ prefix: `contract/${name}` }));

test("a wrong secret is refused, and is in no error", async () => {
  const wrong = "quite-another-secret";
  const store = openStore({ credentials: { accessKeyId: KEY_ID, secretAccessKey: wrong } });
  await assert.rejects(store.put("key", pieces(Buffer.from("x"), 1), signal), (cause: Error) => {
    assert.equal((cause as Error & { code: string }).code, "unavailable");
    assert.match(inspect(cause, { depth: 9 }), /SignatureDoesNotMatch/);
    const shown = inspect(cause, { depth: 9, showHidden: true });
    assert.ok(!shown.includes(wrong) && !shown.includes("Credential="), "no secret, no signature");
    return true;
  });
});

test("a bucket that is missing is a fault, not an absent object", async () => {
  const store = openStore({ bucket: "elsewhere" });
  await assert.rejects(store.get("key", { from: 0 }, signal), { code: "unavailable" });
});

test("requests that a busy server or a cut line lost are sent again", async () => {
  const store = openStore({ prefix: "retries" });
  let lost = 0;
  trouble = ({ method }) =>
    method === "PUT" && (lost += 1) <= 2 ? (lost === 1 ? "busy" : "drop") : undefined;
  await store.put("key", pieces(Buffer.from("arrived"), 3), signal);
  assert.equal(lost, 3);
  assert.equal((await read(await store.get("key", { from: 0 }, signal))).toString(), "arrived");
});

test("a server that does not answer is given up", async () => {
  const store = openStore({ requestTimeoutMs: 200, attempts: 1 });
  trouble = () => "hang";
  await assert.rejects(store.head("key", signal), { code: "unavailable" });
});

test("who waits for a server may leave", async () => {
  const store = openStore();
  trouble = () => "hang";
  const abort = new AbortController();
  const waiting = store.head("key", abort.signal);
  abort.abort(new Error("left"));
  await assert.rejects(waiting, /left/);
});

test("a body that was cut fails, and the rest can be had", async () => {
  const store = openStore({ prefix: "cut" });
  const content = Buffer.alloc(3 << 20, "abcdefg");
  await store.put("key", pieces(content, 1 << 20), signal);
  trouble = () => ({ cutAfter: 1 << 20 });
  const got: Uint8Array[] = [];
  await assert.rejects(async () => {
    for await (const piece of (await store.get("key", { from: 0 }, signal))!.body) got.push(piece);
  });
  trouble = undefined;
  const begun = Buffer.concat(got);
  assert.ok(begun.length <= 1 << 20);
  const rest = await read(await store.get("key", { from: begun.length }, signal));
  assert.ok(Buffer.concat([begun, rest]).equals(content));
});

/** AWS Signature Version 4, written from its documentation and not from the SDK. */
function isSigned({ method, url = "", headers }: IncomingMessage): boolean {
  const match =
    /^AWS4-HMAC-SHA256 Credential=([^/]+)\/(\d{8})\/([^/]+)\/([^/]+)\/aws4_request, ?SignedHeaders=([^,]+), ?Signature=([0-9a-f]{64})$/.exec(
      headers.authorization ?? "",
    );
  if (match === null) return false;
  const [, keyId, day, region, service, signed, signature] = match as unknown as string[];
  const at = new URL(url, "http://host");
  const encode = (text: string): string =>
    encodeURIComponent(text).replace(
      /[!'()*]/g,
      (char) => `%${char.charCodeAt(0).toString(16).toUpperCase()}`,
    );
  const path = at.pathname
    .split("/")
    .map((part) => encode(decodeURIComponent(part)))
    .join("/");
  const query = [...at.searchParams]
    .map(([name, value]) => `${encode(name)}=${encode(value)}`)
    .sort()
    .join("&");
  const names = signed!.split(";");
  const lines = names.map((name) => `${name}:${String(headers[name]).trim().replace(/ +/g, " ")}\n`).join("");
  const canonical = [method, path, query, lines, signed, headers["x-amz-content-sha256"]].join("\n");
  const scope = `${day}/${region}/${service}/aws4_request`;
  const toSign = [
    "AWS4-HMAC-SHA256",
    headers["x-amz-date"],
    scope,
    createHash("sha256").update(canonical).digest("hex"),
  ].join("\n");
  let key: Buffer = Buffer.from(`AWS4${SECRET}`);
  for (const part of [day!, region!, service!, "aws4_request", toSign]) {
    key = createHmac("sha256", key).update(part).digest();
  }
  return keyId === KEY_ID && names.includes("host") && timingSafeEqual(key, Buffer.from(signature!, "hex"));
}
