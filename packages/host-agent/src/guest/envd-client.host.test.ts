/**
 * The client against the real envd, on this host instead of in a guest: in
 * mount and UTS namespaces of its own, so that /init changes nothing here.
 */
import { strict as assert } from "node:assert";
import { spawn } from "node:child_process";
import type { ChildProcess } from "node:child_process";
import { createHash, randomBytes } from "node:crypto";
import { once } from "node:events";
import { existsSync } from "node:fs";
import { mkdtemp, readFile, writeFile } from "node:fs/promises";
import { createServer } from "node:net";
import { hostname, tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, expect, test } from "vitest";
import { buildEnvd } from "../../../envd/build.mjs";
import { removeTree } from "../host/atomic-file.ts";
import type { EnvdTarget } from "../sandbox-manager/sandbox.ts";
import { EnvdClient } from "./envd-client.ts";
import type { Command } from "./process-calls.ts";

const never = new AbortController().signal;
const envd = new EnvdClient();
let dir: string;
let child: ChildProcess;
let target: EnvdTarget;

beforeAll(async () => {
  dir = await mkdtemp(join(tmpdir(), "rookery-envd-"));
  const { bundle } = await buildEnvd(join(dir, "envd"));
  const port = await freePort();
  target = { host: "127.0.0.1", port, accessToken: "the-token" };
  const machineId = join(dir, "machine-id");
  await writeFile(machineId, "");
  child = spawn(
    "unshare",
    [
      "--mount",
      "--uts",
      "--",
      "sh",
      "-c",
      'mount --bind "$1" /etc/machine-id && exec "$2" "$3"',
      "sh",
    ].concat(machineId, process.execPath, bundle),
    {
      env: {
        PATH: process.env["PATH"],
        ROOKERY_ENVD_PORT: String(port),
        ROOKERY_ENVD_ADDRESS: "127.0.0.1",
        ROOKERY_HOST_ADDRESS: "127.0.0.1",
      },
      stdio: ["ignore", "ignore", "inherit"],
    },
  );
  await envd.waitHealthy(target, AbortSignal.timeout(60_000));
});
afterAll(async () => {
  await envd.close();
  if (child.exitCode === null) {
    child.kill("SIGKILL");
    await once(child, "exit");
  }
  await removeTree(dir);
});

async function freePort(): Promise<number> {
  const server = createServer().listen(0, "127.0.0.1");
  await once(server, "listening");
  const address = server.address();
  server.close();
  if (address === null || typeof address === "string") throw new Error("no port");
  return address.port;
}

const command = (overrides: Partial<Command>): Command => ({
  cmd: "true",
  args: [],
  shell: true,
  env: { HOME: dir }, // not the profile of who runs the tests
  stdin: new Uint8Array(),
  timeoutMs: 30_000,
  ...overrides,
});
const exec = (overrides: Partial<Command>, signal = never) =>
  envd.exec(target, command(overrides), { maxOutputBytes: 1 << 20 }, signal);

test("before /init nobody is served; with it, commands run in the environment it gave", async () => {
  await assert.rejects(exec({ cmd: "true" }), { code: "guest_error" });
  const init = {
    restoreId: randomBytes(16).toString("hex"),
    sandboxId: "sbx",
    hostname: hostname(),
    machineId: randomBytes(16).toString("hex"),
    timestamp: new Date().toISOString(),
    entropy: randomBytes(64).toString("base64"),
    envVars: { FROM_INIT: "yes" },
    accessToken: target.accessToken,
    defaultUser: "root",
    growRootFs: false,
  };
  await envd.init(target, init, never);
  await envd.init(target, init, never);
  const result = await exec({
    cmd: 'echo "$FROM_INIT $MINE"; echo oops >&2; exit 7',
    env: { MINE: "too", HOME: dir },
  });
  assert.equal(Buffer.from(result.stdout).toString(), "yes too\n");
  assert.equal(Buffer.from(result.stderr).toString(), "oops\n");
  assert.deepEqual(
    [result.exitCode, result.signal, result.timedOut, result.truncated],
    [7, undefined, false, false],
  );
});

test("another token is not accepted", async () => {
  const call = envd.exec({ ...target, accessToken: "wrong" }, command({}), { maxOutputBytes: 1 }, never);
  await assert.rejects(call, { code: "guest_error" });
});

test("a signal that ends a command is named", async () => {
  const result = await exec({ cmd: "kill -SEGV $$" });
  assert.deepEqual([result.exitCode, result.signal], [-1, "SIGSEGV"]);
});

test("a time-out kills the whole process group and says so", async () => {
  const pidFile = join(dir, "pids");
  const result = await exec({ cmd: `sleep 600 & echo $! $$ > ${pidFile}; sleep 600`, timeoutMs: 1_500 });
  assert.deepEqual([result.timedOut, result.signal], [true, "SIGKILL"]);
  for (const pid of (await readFile(pidFile, "utf8")).trim().split(" ")) {
    await expect.poll(() => isRunning(pid)).toBe(false);
  }
});

test("an abort kills the command", async () => {
  const pidFile = join(dir, "aborted");
  const abort = new AbortController();
  const running = exec({ cmd: `echo $$ > ${pidFile}; exec sleep 600` }, abort.signal);
  running.catch(() => undefined);
  await expect.poll(() => existsSync(pidFile), { timeout: 10_000 }).toBe(true);
  abort.abort(new Error("gone"));
  await assert.rejects(running, /^Error: gone$/);
  const pid = (await readFile(pidFile, "utf8")).trim();
  await expect.poll(() => isRunning(pid)).toBe(false);
});

test("a descendant that leaves the group does not hold the answer", async () => {
  const result = await exec({ cmd: "setsid sleep 20 & echo done", timeoutMs: 1_500 });
  assert.equal(Buffer.from(result.stdout).toString(), "done\n");
});

test("a mebibyte of input arrives, and unread input is nobody's fault", async () => {
  const stdin = randomBytes(1 << 20);
  const result = await exec({ cmd: "sha256sum", shell: false, stdin });
  assert.equal(Buffer.from(result.stdout).toString().slice(0, 64), sha256(stdin));
  assert.equal((await exec({ cmd: "head -c 1 > /dev/null", stdin })).exitCode, 0);
});

test("output is cut at the cap and the command ends none the less", async () => {
  const result = await exec({ cmd: "head -c 5000000 /dev/zero" });
  assert.deepEqual([result.stdout.byteLength, result.truncated, result.exitCode], [1 << 20, true, 0]);
});

test("what can't be started is refused with the cause's code", async () => {
  await assert.rejects(exec({ cmd: "/nope", shell: false }), { code: "invalid_request" });
  await assert.rejects(exec({ cwd: "/nope" }), { code: "invalid_request" });
  await assert.rejects(exec({ user: "no-such-user" }), { code: "invalid_request" });
});

test("a file comes back as it was written, and what is wrong with a path is told", async () => {
  const data = randomBytes(20 << 20);
  async function* pieces() {
    for (let at = 0; at < data.byteLength; at += 1 << 20) yield data.subarray(at, at + (1 << 20));
  }
  const path = join(dir, "new", "folder", "a file & more");
  assert.equal(await envd.writeFile(target, { path }, pieces(), never), data.byteLength);
  const back: Uint8Array[] = [];
  for await (const part of envd.readFile(target, { path }, never)) {
    if (part instanceof Uint8Array) back.push(part);
    else assert.equal(part.sizeBytes, data.byteLength);
  }
  assert.equal(sha256(Buffer.concat(back)), sha256(data));
  await assert.rejects(envd.writeFile(target, { path: "/tmp" }, pieces(), never), { code: "invalid_path" });
  await assert.rejects(
    async () => {
      for await (const _ of envd.readFile(target, { path: "/nope" }, never)) continue;
    },
    { code: "file_not_found" },
  );
});

test("an upload that breaks off leaves the old file", async () => {
  const path = join(dir, "kept");
  await writeFile(path, "old");
  async function* broken() {
    yield Buffer.alloc(1 << 20);
    throw new Error("sender gone");
  }
  await assert.rejects(envd.writeFile(target, { path }, broken(), never), /sender gone/);
  assert.equal(await readFile(path, "utf8"), "old");
});

function sha256(bytes: Uint8Array): string {
  return createHash("sha256").update(bytes).digest("hex");
}

async function isRunning(pid: string): Promise<boolean> {
  const stat = await readFile(`/proc/${pid}/stat`, "utf8").catch(() => undefined);
  return stat !== undefined && !/\) [ZX] /.test(stat);
}
