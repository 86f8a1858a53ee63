import { strict as assert } from "node:assert";
import { test } from "vitest";
import { parseAddress, readConfig } from "./config.ts";

const read = (env: Record<string, string> = {}, flags = {}) =>
  readConfig(env, flags, "/repo/packages/host-agent");

test("without any setting the agent is on loopback, and its parts are where the repository has them", () => {
  const config = read();
  assert.deepEqual(config.listen, { host: "127.0.0.1", port: 7071 });
  assert.equal(config.envdBundleDir, "/repo/packages/envd/dist");
  assert.match(config.runtimeDir, /^\/run\/rookery-[0-9a-f]{8}\/agent$/);
  assert(Object.isFrozen(config));
});

test("a flag wins over its variable", () => {
  const config = read({ ROOKERY_AGENT_DATA: "/a" }, { data: "/b", address: "[::1]:0" });
  assert.equal(config.dataDir, "/b");
  assert.deepEqual(config.listen, { host: "::1", port: 0 });
});

test("only loopback goes without TLS, and what is dialled may differ from what is listened on", () => {
  assert.equal(read().tls, false);
  assert.equal(read({}, { address: "[::1]:7071" }).tls, false);
  const remote = read({}, { address: "192.0.2.7:7071" });
  assert.equal(remote.tls, true);
  assert.deepEqual(remote.listen, { host: "192.0.2.7", port: 7071 });
  const named = read({
    ROOKERY_AGENT_ADDRESS: "agent-7.example.org:443",
    ROOKERY_AGENT_LISTEN: "0.0.0.0:7071",
  });
  assert.deepEqual(named.address, { host: "agent-7.example.org", port: 443 });
  assert.deepEqual(named.listen, { host: "0.0.0.0", port: 7071 });
  assert.equal(named.tls, true);
  const forwarded = { ROOKERY_AGENT_ADDRESS: "192.0.2.7:7071", ROOKERY_AGENT_LISTEN: "127.0.0.1:1" };
  assert.equal(read(forwarded).tls, true);
});

test("an object store is a directory or a bucket", () => {
  assert.equal(read().objectStore, undefined);
  const directory = read({ ROOKERY_OBJECT_STORE: "dir:/srv/snapshots/" }).objectStore;
  assert.deepEqual(directory, { kind: "directory", path: "/srv/snapshots" });
  const bucket = read({
    ROOKERY_OBJECT_STORE: "s3://bucket-1/some/prefix/",
    ROOKERY_S3_ENDPOINT: "https://s3.example.org",
    ROOKERY_S3_REGION: "eu-central-1",
    ROOKERY_S3_ACCESS_KEY_ID: "id",
    ROOKERY_S3_SECRET_ACCESS_KEY: "secret",
  }).objectStore;
  assert.deepEqual(bucket, {
    kind: "s3",
    bucket: "bucket-1",
    prefix: "some/prefix",
    region: "eu-central-1",
    endpoint: "https://s3.example.org",
    credentials: { accessKeyId: "id", secretAccessKey: "secret", sessionToken: undefined },
  });
});

test("two data directories have two names on the host", () => {
  assert.notEqual(read({}, { data: "/a" }).instance, read({}, { data: "/b" }).instance);
});

test("what is wrong is named", () => {
  const refused = (env: Record<string, string>, words: RegExp) =>
    assert.throws(() => read(env), { code: "invalid_request", message: words });
  refused({ ROOKERY_POOL: "many" }, /^ROOKERY_POOL: must be a whole number/);
  refused({ ROOKERY_POOL: "100000" }, /^ROOKERY_POOL/);
  refused({ ROOKERY_SLOTS: "1000" }, /^ROOKERY_SLOTS: must be a power of two/);
  refused({ ROOKERY_VMM: "xen" }, /^ROOKERY_VMM/);
  refused({ ROOKERY_RUNTIME_DIR: "run" }, /^ROOKERY_RUNTIME_DIR: must be an absolute path/);
  for (const store of ["/srv", "dir:srv", "s3://", "s3://B", "ftp://x/y", "s3://bucket/../x y"]) {
    refused({ ROOKERY_OBJECT_STORE: store }, /^ROOKERY_OBJECT_STORE: must be dir:/);
  }
  refused({ ROOKERY_OBJECT_STORE: "s3://bucket", ROOKERY_S3_ACCESS_KEY_ID: "id" }, /go together/);
  refused({ ROOKERY_RESOLVERS: "1.1.1.1,x" }, /^ROOKERY_RESOLVERS/);
  refused({ ROOKERY_CONTROL_PLANE: "http://10.0.0.1:8080" }, /plain HTTP is for loopback only/);
  refused({ ROOKERY_CONTROL_PLANE: "ftp://x" }, /^ROOKERY_CONTROL_PLANE/);
  refused({ ROOKERY_REGISTRATION_TOKEN: "t" }, /needs the control plane's URL/);
  refused({ ROOKERY_AGENT_ADDRESS: "0.0.0.0:7071" }, /nobody can call 0\.0\.0\.0/);
  refused({ ROOKERY_AGENT_ADDRESS: "[::]:7071" }, /nobody can call ::/);
  refused({ ROOKERY_AGENT_ADDRESS: "agent-7:7071" }, /^ROOKERY_AGENT_LISTEN: must be an IP address/);
  refused({ ROOKERY_CONTROL_PLANE_CA: "ca.pem" }, /^ROOKERY_CONTROL_PLANE_CA/);
  for (const text of ["7071", "host", "a:b:1", "127.0.0.1:70000", "[127.0.0.1:1"]) {
    assert.throws(() => parseAddress(text), { code: "invalid_request" });
  }
});
