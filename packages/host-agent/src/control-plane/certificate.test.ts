import { strict as assert } from "node:assert";
import { createHash, createPrivateKey, generateKeyPairSync, randomBytes, X509Certificate } from "node:crypto";
import { mkdtemp, readFile, rm, stat, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, test } from "vitest";
import { removeTree, temporaryPathOf } from "../host/atomic-file.ts";
import { openCertificate } from "./certificate.ts";

let dir: string;
const path = () => join(dir, "certificate.pem");
const open = () => openCertificate(dir, { nowMs: () => Date.UTC(2026, 0, 1), randomBytes });

beforeEach(async () => {
  dir = await mkdtemp(join(tmpdir(), "rookery-certificate-"));
});
afterEach(() => removeTree(dir));

test("the certificate is made once, for root's eyes alone, and does not end", async () => {
  const first = await open();
  assert.equal((await stat(path())).mode & 0o777, 0o600);
  assert.deepEqual(await open(), first);
  const certificate = new X509Certificate(await readFile(path()));
  assert(certificate.verify(certificate.publicKey));
  assert(certificate.checkPrivateKey(createPrivateKey(first.pem)));
  assert.equal(certificate.ca, false);
  assert.deepEqual(certificate.keyUsage, ["1.3.6.1.5.5.7.3.1"]);
  assert.equal(certificate.validFromDate.getTime(), Date.UTC(2026, 0, 1));
  assert.match(certificate.validTo, /9999/);
  assert.equal(first.fingerprint, createHash("sha256").update(certificate.raw).digest("hex"));
});

test("no two hosts have one certificate, and a lost one is followed by another", async () => {
  const { fingerprint } = await open();
  await rm(path());
  assert.notEqual((await open()).fingerprint, fingerprint);
});

test("an agent that died while it wrote the first one makes another", async () => {
  await writeFile(temporaryPathOf(path()), "-----BEGIN CERT");
  await open();
});

test("a file that is no fitting pair is named, and left as it is", async () => {
  const { pem } = await open();
  const [certificate] = pem.split("-----BEGIN PRIVATE KEY-----");
  const stranger = generateKeyPairSync("ec", { namedCurve: "P-256" }).privateKey;
  const other = stranger.export({ format: "pem", type: "pkcs8" }).toString();
  for (const bad of ["", certificate!, certificate! + other]) {
    await writeFile(path(), bad);
    await assert.rejects(open(), { code: "invalid_request", message: /certificate\.pem does not hold/ });
    assert.equal(await readFile(path(), "utf8"), bad);
  }
});
