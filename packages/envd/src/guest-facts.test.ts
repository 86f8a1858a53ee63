import assert from "node:assert/strict";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, test } from "vitest";
import { readConfig } from "./config.ts";
import { withOwnName } from "./init/apply-init.ts";
import { parseTimestamp } from "./init/init-request.ts";
import { parseCpuTimes, parseMemory } from "./metrics.ts";
import { Users } from "./system/users.ts";

const folder = mkdtempSync(join(tmpdir(), "envd-users-"));
afterAll(() => rmSync(folder, { recursive: true }));

test("users have their groups, and the files are read again when they change", () => {
  const passwd = join(folder, "passwd");
  const group = join(folder, "group");
  writeFileSync(
    passwd,
    "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1001::/home/user:/bin/bash\nbad:x:y:0::/:\n",
  );
  writeFileSync(group, "root:x:0:\nsudo:x:27:user,other\nusers:x:1001:\n");
  const users = new Users({ passwd, group });
  assert.deepEqual(users.find("user"), {
    name: "user",
    uid: 1000,
    gid: 1001,
    home: "/home/user",
    groups: [1001, 27],
  });
  assert.equal(users.find("bad"), undefined);
  assert.equal(users.find("new"), undefined);
  assert.deepEqual([users.userName(1000), users.userName(5), users.groupName(27)], ["user", "5", "sudo"]);
  writeFileSync(passwd, "new:x:5:5::/:\n", { flag: "a" });
  assert.equal(users.find("new")?.uid, 5);
});

test("the kernel's command line names the host where the environment does not", () => {
  const hosts = (env: Record<string, string>, commandLine = "") => [
    ...readConfig(env, () => commandLine).hostAddresses,
  ];
  assert.deepEqual(hosts({}), ["169.254.0.22", "10.0.2.2"]);
  assert.deepEqual(hosts({}, "quiet rookery.host_address=10.1.1.1,10.1.1.2 x"), ["10.1.1.1", "10.1.1.2"]);
  assert.deepEqual(hosts({ ROOKERY_HOST_ADDRESS: "10.2.2.2" }, "rookery.host_address=10.1.1.1"), [
    "10.2.2.2",
  ]);
  assert.throws(() => hosts({ ROOKERY_HOST_ADDRESS: "host.example" }), /no IPv4/);
  assert.throws(() => readConfig({ ROOKERY_ENVD_PORT: "70000" }, () => ""), /no port/);
});

test("a guest's own name replaces its old one and nothing else", () => {
  assert.equal(
    withOwnName("127.0.0.1 localhost\n127.0.1.1 old\n", "new"),
    "127.0.0.1 localhost\n127.0.1.1 new\n",
  );
  assert.equal(withOwnName("10.0.0.1 db", "n"), "10.0.0.1 db\n127.0.1.1 n\n");
});

test("times keep their nanoseconds", () => {
  assert.deepEqual(parseTimestamp("2026-11-24T10:00:00.123456789Z"), {
    seconds: 1_795_514_400n,
    nanoseconds: 123_456_789n,
  });
  assert.deepEqual(parseTimestamp("1970-01-01T00:00:01Z"), { seconds: 1n, nanoseconds: 0n });
  assert.throws(() => parseTimestamp("2026-02-31T25:00:00Z"));
});

test("metrics are read as proc(5) has them", () => {
  assert.deepEqual(parseCpuTimes("cpu  10 1 5 100 4 2 3 1 0 0\ncpu0 1 1 1"), { busy: 22, total: 126 });
  assert.deepEqual(
    parseMemory(
      "MemTotal: 1000 kB\nMemFree: 100 kB\nMemAvailable: 600 kB\nBuffers: 10 kB\nCached: 20 kB\nSReclaimable: 5 kB\n",
    ),
    { total: 1_024_000, used: 409_600, cache: 35_840 },
  );
});
