import assert from "node:assert/strict";
import { execFileSync, spawnSync } from "node:child_process";
import { chmodSync, existsSync, mkdtempSync, rmSync, statSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import path from "node:path";
import { Client } from "pg";
import { afterAll, beforeAll, test } from "vitest";
import { DEFAULT_UID, postgresPid, startPostgres, stopPostgres } from "./embedded-postgres.ts";

const isRoot = process.getuid?.() === 0;
const root = mkdtempSync(path.join(tmpdir(), "rookery-embedded-"));
const place = {
  home: path.join(root, "home"),
  socketDir: path.join(root, "s"),
  uid: isRoot ? DEFAULT_UID : undefined,
  timeoutMs: 60_000,
};

beforeAll(() => chmodSync(root, 0o755));
afterAll(async () => {
  await stopPostgres(place.home, 10_000);
  rmSync(root, { recursive: true, force: true });
});

async function ask(url: string, query: string): Promise<unknown> {
  const client = new Client({ connectionString: url });
  client.on("error", () => undefined);
  await client.connect();
  try {
    const { rows } = await client.query<Record<string, unknown>>(query);
    return Object.values(rows[0] ?? {})[0];
  } finally {
    await client.end();
  }
}

test("it starts once, takes connections by its socket only, and keeps what was written", async () => {
  const first = await startPostgres(place);
  assert.equal(await ask(first.url, "show fsync"), "on");
  assert.equal(await ask(first.url, "show listen_addresses"), "");
  await ask(first.url, "create table kept as select 42 as n");
  assert.deepEqual(await startPostgres(place), first);
  await stopPostgres(place.home, 10_000);
  assert.equal(await postgresPid(place.home), undefined);
  const again = await startPostgres(place);
  assert.equal(await ask(again.url, "select n from kept"), 42);
});

test("it survives kill -9: the next start recovers, and a pid file that names a stranger misleads nobody", async () => {
  const { pid, url } = await startPostgres(place);
  await ask(url, "create table survived as select 7 as n");
  process.kill(pid, "SIGKILL");
  const again = await startPostgres(place);
  assert.notEqual(again.pid, pid);
  assert.equal(await ask(again.url, "select n from survived"), 7);
  await stopPostgres(place.home, 10_000);
  writeFileSync(path.join(place.home, "data/postmaster.pid"), `${process.pid}\n${place.home}/data\n`);
  assert.equal(await ask((await startPostgres(place)).url, "select n from survived"), 7);
});

test("no server starts beside a backend that outlived its server", async () => {
  const { pid, url } = await startPostgres(place);
  const client = new Client({ connectionString: url });
  client.on("error", () => undefined);
  await client.connect();
  const { rows } = await client.query<{ pid: number }>("select pg_backend_pid() as pid");
  const backend = rows[0]?.pid ?? 0;
  assert.ok(backend > 1);
  process.kill(backend, "SIGSTOP");
  try {
    process.kill(pid, "SIGKILL");
    await assert.rejects(startPostgres({ ...place, timeoutMs: 1_000 }), /still use/);
    assert.ok(existsSync(path.join(place.home, "data/postmaster.pid")));
  } finally {
    process.kill(backend, "SIGCONT");
  }
  const again = await startPostgres(place);
  assert.notEqual(again.pid, pid);
  await client.end();
});

test("stopping twice is stopping once, with clients at work too", async () => {
  const { url } = await startPostgres(place);
  const client = new Client({ connectionString: url });
  client.on("error", () => undefined);
  await client.connect();
  const sleeping = client.query("select pg_sleep(60)").then(
    () => "slept",
    () => "ended",
  );
  await stopPostgres(place.home, 10_000);
  await stopPostgres(place.home, 10_000);
  assert.equal(await sleeping, "ended");
});

test.skipIf(!isRoot)(
  "another user can't connect, and the server's own uid is no account of this machine",
  async () => {
    const { pid, socketDir } = await startPostgres(place);
    assert.equal(statSync(`/proc/${pid}`).uid, DEFAULT_UID);
    assert.equal(statSync(socketDir).mode & 0o777, 0o700);
    const accounts = execFileSync("getent", ["passwd"], { encoding: "utf8" });
    assert.ok(!accounts.includes(`:${DEFAULT_UID}:`));
    const socket = path.join(socketDir, ".s.PGSQL.5432");
    assert.ok(existsSync(socket));
    const script = `require("net").connect(${JSON.stringify(socket)}).on("connect",()=>process.exit(0)).on("error",(e)=>{console.error(e.code);process.exit(3)})`;
    const asUid = (uid: number) =>
      spawnSync(process.execPath, ["-e", script], { uid, gid: uid, encoding: "utf8", cwd: "/" });
    // The test's own Node may lie where no other uid can run it: then there is nothing to see.
    const own = asUid(DEFAULT_UID);
    if (own.error) return;
    assert.equal(own.status, 0);
    assert.match(asUid(65_534).stderr, /EACCES/);
  },
);
