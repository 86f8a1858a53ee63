import { strict as assert } from "node:assert";
import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync } from "node:fs";
import { createServer } from "node:https";
import type { Server } from "node:https";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, test } from "vitest";
import { removeTree } from "../host/atomic-file.ts";
import { ControlPlaneClient } from "./control-plane-client.ts";

let dir: string;
let server: Server;
let url: string;
const signal = new AbortController().signal;

function authority(name: string): { key: string; cert: string } {
  const [key, cert] = [join(dir, `${name}.key`), join(dir, `${name}.pem`)];
  const kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1"];
  const names = ["-subj", `/CN=${name}`, "-addext", "subjectAltName=IP:127.0.0.1"];
  execFileSync("openssl", ["req", "-x509", ...kind, "-keyout", key, "-out", cert, ...names], {
    stdio: "ignore",
  });
  return { key: readFileSync(key, "utf8"), cert: readFileSync(cert, "utf8") };
}

let own: string;
let other: string;
let calls = 0;
beforeAll(async () => {
  dir = mkdtempSync(join(tmpdir(), "rookery-plane-"));
  const pair = authority("own");
  own = pair.cert;
  other = authority("other").cert;
  server = createServer(pair, (_request, response) => {
    calls += 1;
    response.end('{"access_token":"a","refresh_token":"r"}');
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  url = `https://127.0.0.1:${(server.address() as { port: number }).port}`;
});
afterAll(async () => {
  server.closeAllConnections();
  await new Promise((resolve) => server.close(resolve));
  await removeTree(dir);
});

test("a control plane with a certificate of a private authority is trusted where that authority is named", async () => {
  await using client = new ControlPlaneClient(url, { timeoutMs: 10_000, ca: own });
  assert.deepEqual(await client.refresh("r", signal), { accessToken: "a", refreshToken: "r" });
});

test("a control plane that no named authority vouches for is told nothing", async () => {
  const before = calls;
  for (const ca of [undefined, other]) {
    await using client = new ControlPlaneClient(url, { timeoutMs: 10_000, ca });
    await assert.rejects(client.refresh("r", signal), /self-signed certificate|unable to verify/);
  }
  assert.equal(calls, before);
});
