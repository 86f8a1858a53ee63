/**
 * The image boots under plain QEMU, and the guest is what DESIGN §6 promises.
 */
import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import { afterAll, beforeAll, test } from "vitest";
import { EnvdClient } from "../guest/envd-client.ts";
import type { PlainGuest } from "./testing/plain-guest.ts";
import { bootPlainGuest } from "./testing/plain-guest.ts";
import { testImage } from "./testing/test-image.ts";

const BOOT_TIMEOUT_MS = 120_000;
const COMMAND_TIMEOUT_MS = 60_000;
const ACCESS_TOKEN = "token-of-this-test";

const envd = new EnvdClient();
let guest: PlainGuest;

beforeAll(async () => {
  const image = await testImage(AbortSignal.timeout(290_000));
  guest = await bootPlainGuest(image, AbortSignal.timeout(30_000));
}, 300_000);

afterAll(async () => {
  await guest[Symbol.asyncDispose]();
  await envd.close();
});

async function initialise(hostname: string): Promise<void> {
  const now = new Date();
  await envd.init(
    guest.envd,
    {
      restoreId: randomBytes(16).toString("hex"),
      sandboxId: "sb000000000000000000",
      hostname,
      machineId: randomBytes(16).toString("hex"),
      timestamp: now.toISOString(),
      entropy: randomBytes(64).toString("base64"),
      envVars: {},
      accessToken: ACCESS_TOKEN,
      defaultUser: "user",
      growRootFs: false,
    },
    AbortSignal.timeout(COMMAND_TIMEOUT_MS),
  );
}

/** Output of a shell command that must succeed, without the last line break. */
async function sh(script: string): Promise<string> {
  const { stdout, stderr, exitCode } = await envd.exec(
    { ...guest.envd, accessToken: ACCESS_TOKEN },
    { cmd: script, args: [], shell: true, env: {}, stdin: new Uint8Array(), timeoutMs: COMMAND_TIMEOUT_MS },
    { maxOutputBytes: 1 << 20 },
    AbortSignal.timeout(COMMAND_TIMEOUT_MS),
  );
  assert.equal(exitCode, 0, `${script}: ${Buffer.from(stderr).toString()}`);
  return Buffer.from(stdout).toString().trimEnd();
}

test("a guest boots to an envd that answers", async () => {
  const startedAt = performance.now();
  await envd.waitHealthy(guest.envd, AbortSignal.timeout(BOOT_TIMEOUT_MS));
  console.log(
    JSON.stringify({ name: "image-boot", value: Math.round(performance.now() - startedAt), unit: "ms" }),
  );
  await initialise("sbfirst");
});

test("nothing of init failed", async () => {
  assert.doesNotMatch(await guest.console(), /rookery-init: failed|rookery initrd|keep-envd/);
});

test("users find the programs of the base image", async () => {
  const lines = await sh(`
    python3 -c 'print(6 * 7)' && python -c 'print(6 * 7)'
    node -p 'process.version' && nodejs -p '6 * 7'
    git --version && curl --version | head -1
    ip -V && ps --version && sudo --version | head -1
    test -f /etc/ssl/certs/ca-certificates.crt && echo certificates`);
  const expected = [
    "42",
    "42",
    process.version,
    "42",
    "git version",
    "curl",
    "ip utility",
    "ps from",
    "Sudo",
    "certificates",
  ];
  const found = lines.split("\n");
  assert.equal(found.length, expected.length, lines);
  expected.forEach((text, index) =>
    assert.ok(found[index]?.startsWith(text), `${found[index]} is not ${text}`),
  );
});

test("a user's process is user 1000 with umask 022, a locale, and sudo without a password", async () => {
  assert.equal(await sh("id -u; id -g; pwd; umask; echo $LANG"), "1000\n1000\n/home/user\n0022\nC.UTF-8");
  assert.equal(await sh("sudo -n id -u 2>&1"), "0"); // without a complaint about the host's name
  assert.equal(await sh("hostname; getent hosts sbfirst | wc -l"), "sbfirst\n1");
});

test("the guest has the file systems of an ordinary Linux, and /tmp on its disk", async () => {
  const types = await sh(
    "for p in /proc /sys /dev /dev/pts /dev/shm /run /sys/fs/cgroup /tmp; do stat -f -c %T $p; done",
  );
  assert.equal(types, "proc\nsysfs\ntmpfs\ndevpts\ntmpfs\ntmpfs\ncgroup2fs\next2/ext3");
  assert.equal(await sh("stat -c %a /tmp /dev/shm /dev/ptmx"), "1777\n1777\n666");
  assert.match(await sh("cat /proc/mounts"), /^\/dev\/vda \/ ext4 rw,noatime,.*errors=remount-ro/m);
  assert.match(await sh("cat /sys/fs/cgroup/cgroup.subtree_control"), /cpu.*memory.*pids/);
});

test("a terminal can be had", async () => {
  assert.match(await sh("script -qec 'tty; echo done' /dev/null"), /\/dev\/pts\/\d+\s+done/);
});

test("the network is as the kernel's command line says", async () => {
  assert.match(await sh("ip -brief -4 address show eth0"), /UP\s+10\.0\.2\.15\/24/);
  assert.match(await sh("ip route"), /^default via 10\.0\.2\.2 dev eth0/);
  assert.equal(await sh("cat /etc/resolv.conf"), "nameserver 10.0.2.3");
  assert.equal(await sh("ip -6 address show eth0"), "");
});

test("nothing listens but envd, and nobody waits for a login", async () => {
  assert.match(
    await sh("ss --no-header --listening --tcp --udp --numeric"),
    /^tcp\s+LISTEN[^\n]*:49983[^\n]*$/,
  );
  const names = await sh("ps -e -o pid=,ppid=,comm= | awk '$1 != 2 && $2 != 2 { print $3 }' | sort -u");
  assert.doesNotMatch(names, /getty|login|sshd|cron|systemd|dbus/);
});

test("envd's crash does not end the guest or what runs in it", async () => {
  await sh("setsid sleep 1000 </dev/null >/dev/null 2>&1 &");
  const before = await sh("pgrep -f /usr/lib/rookery/envd.mjs | head -1");
  const killed = envd.exec(
    { ...guest.envd, accessToken: ACCESS_TOKEN },
    {
      cmd: "sudo pkill -9 -f envd.mjs",
      args: [],
      shell: true,
      env: {},
      stdin: new Uint8Array(),
      timeoutMs: 0,
    },
    { maxOutputBytes: 1024 },
    AbortSignal.timeout(COMMAND_TIMEOUT_MS),
  );
  await assert.rejects(killed);
  await envd.waitHealthy(guest.envd, AbortSignal.timeout(BOOT_TIMEOUT_MS));
  await initialise("sbsecond");
  assert.notEqual(await sh("pgrep -f /usr/lib/rookery/envd.mjs | head -1"), before);
  assert.equal(await sh("pgrep -x sleep | wc -l"), "1");
});

test("a broken kernel ends the VM, and the console says why", async () => {
  // Expected to break from the start: the connection may end before the VM does.
  const broken = assert.rejects(
    sh("echo 1 | sudo tee /proc/sys/kernel/sysrq && echo c | sudo tee /proc/sysrq-trigger"),
  );
  await guest.exited;
  await broken;
  assert.match(await guest.console(), /Kernel panic - not syncing: sysrq triggered crash/);
});
