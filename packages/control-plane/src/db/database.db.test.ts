import assert from "node:assert/strict";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import path from "node:path";
import { test } from "vitest";
import { asDatabaseError, isDatabaseAway, openDatabase } from "./database.ts";
import { MIGRATIONS_DIR, type Migration, isMigrated, migrate, readMigrations } from "./migrate.ts";
import { generateSchemaTypes } from "./testing/schema-types.ts";
import { openTestDatabase, useTestDatabase } from "./testing/test-database.ts";

const database = useTestDatabase();

function failureOf(work: Promise<unknown>): Promise<unknown> {
  return work.then(
    () => assert.fail("it succeeded"),
    (cause: unknown) => cause,
  );
}

function fakeMigration(number: number, sql: string): Migration {
  return { number, name: `fake_${number}`, sql, checksum: `checksum of ${sql}` };
}

test("the committed types are what the migrations make", async () => {
  const dir = mkdtempSync(path.join(tmpdir(), "rookery-types-"));
  try {
    const fresh = path.join(dir, "schema.ts");
    await generateSchemaTypes(database.url, fresh);
    const committed = readFileSync(path.join(import.meta.dirname, "schema.ts"), "utf8");
    const bare = (text: string) => text.replaceAll(/\s+|[|,;]/g, "");
    assert.equal(
      bare(readFileSync(fresh, "utf8")),
      bare(committed),
      "npm run generate -w packages/control-plane",
    );
  } finally {
    rmSync(dir, { recursive: true });
  }
});

test("replicas that start together migrate once", async () => {
  const migrations = await readMigrations(MIGRATIONS_DIR);
  await database.pool.query("create schema together");
  const url = `${database.url}&options=${encodeURIComponent("-c search_path=together")}`;
  const pools = Array.from({ length: 4 }, () => openTestDatabase(url));
  try {
    const applied = await Promise.all(pools.map(({ pool }) => migrate(pool, migrations)));
    assert.deepEqual(
      applied.flat(),
      migrations.map(({ number }) => number),
    );
  } finally {
    await Promise.all(pools.map(({ close }) => close()));
  }
});

test("a migration that was edited after it was applied is refused", async () => {
  const [first, ...rest] = await readMigrations(MIGRATIONS_DIR);
  assert.ok(first);
  const edited = [{ ...first, checksum: "another" }, ...rest];
  await assert.rejects(migrate(database.pool, edited), /another content/);
  await assert.rejects(isMigrated(database.pool, edited), /another content/);
});

test("an older release refuses a newer database", async () => {
  await assert.rejects(migrate(database.pool, []), /does not know/);
});

test("a migration that fails leaves nothing of itself, and says which it was", async () => {
  const migrations = await readMigrations(MIGRATIONS_DIR);
  const next = fakeMigration(migrations.length + 1, "create table half (); select 1/0");
  await assert.rejects(migrate(database.pool, [...migrations, next]), /fake_/);
  const { rows } = await database.pool.query<{ there: string | null }>("select to_regclass('half') as there");
  assert.equal(rows[0]?.there, null);
  assert.equal(await isMigrated(database.pool, [...migrations, next]), false);
  assert.equal(await isMigrated(database.pool, migrations), true);
});

test("a database that is away is told apart from a question that is wrong", async () => {
  const gone = openDatabase({
    url: "postgresql://rookery@localhost/rookery?host=/nowhere",
    maxConnections: 1,
    connectTimeoutMs: 500,
    statementTimeoutMs: 500,
    onError: () => undefined,
  });
  const away = await failureOf(gone.pool.query("select 1"));
  assert.ok(isDatabaseAway(away));
  assert.equal((asDatabaseError(away) as { code: string }).code, "unavailable");
  await gone.close();
  const wrong = await failureOf(database.pool.query("select nothing"));
  assert.ok(!isDatabaseAway(wrong));
  assert.equal(asDatabaseError(wrong), wrong);
});

test("a connection that the server ends is a database that is away", async () => {
  const client = await database.pool.connect();
  client.on("error", () => undefined);
  const { rows } = await client.query<{ pid: number }>("select pg_backend_pid() as pid");
  const sleeping = failureOf(client.query("select pg_sleep(30)"));
  await database.pool.query("select pg_terminate_backend($1)", [rows[0]?.pid]);
  assert.ok(isDatabaseAway(await sleeping));
  client.release(true);
});
