/**
 * Migrations: plain SQL files, forward only, each in one transaction.
 *
 * Applied files are never edited: their checksums are compared at each start.
 * An advisory lock lets replicas start together. A database that knows more
 * migrations than this release is refused: an older release must not write to it.
 */
import { createHash } from "node:crypto";
import { readFile, readdir } from "node:fs/promises";
import path from "node:path";
import type { Pool, PoolClient } from "pg";

export interface Migration {
  number: number;
  name: string;
  sql: string;
  checksum: string;
}

/** Any constant will do, as long as it stays. */
const LOCK = 7_233_011_904n;

/** Beside this file in the sources, and beside the bundle in a release. */
export const MIGRATIONS_DIR = path.join(import.meta.dirname, "migrations");

export async function readMigrations(directory: string): Promise<Migration[]> {
  const files = (await readdir(directory)).filter((file) => file.endsWith(".sql")).sort();
  return Promise.all(
    files.map(async (file) => {
      const match = /^(\d{4})_([a-z0-9_]+)\.sql$/.exec(file);
      if (!match) throw new Error(`migration ${file} is not named NNNN_name.sql`);
      const sql = await readFile(path.join(directory, file), "utf8");
      return {
        number: Number(match[1]),
        name: match[2] ?? "",
        sql,
        checksum: createHash("sha256").update(sql).digest("hex"),
      };
    }),
  );
}

/** Numbers of the migrations that were applied now. */
export async function migrate(pool: Pool, migrations: readonly Migration[]): Promise<number[]> {
  const client = await pool.connect();
  try {
    await client.query("select pg_advisory_lock($1)", [LOCK]);
    await client.query(`create table if not exists schema_migrations (
      number integer primary key, name text not null, checksum text not null,
      applied_at timestamptz not null default now())`);
    const applied = await readApplied(client);
    compare(applied, migrations);
    const due = migrations.slice(applied.length);
    for (const migration of due) await apply(client, migration);
    return due.map(({ number }) => number);
  } finally {
    // The lock goes with the connection, whatever state it is in.
    client.release(true);
  }
}

/** True when exactly these migrations were applied. */
export async function isMigrated(pool: Pool, migrations: readonly Migration[]): Promise<boolean> {
  const { rows } = await pool.query<{ exists: boolean }>(
    "select to_regclass('schema_migrations') is not null as exists",
  );
  if (!rows[0]?.exists) return false;
  const applied = await readApplied(pool);
  compare(applied, migrations);
  return applied.length === migrations.length;
}

interface Applied {
  number: number;
  checksum: string;
}

async function readApplied(queryable: Pool | PoolClient): Promise<Applied[]> {
  const { rows } = await queryable.query<Applied>(
    "select number, checksum from schema_migrations order by number",
  );
  return rows;
}

function compare(applied: readonly Applied[], migrations: readonly Migration[]): void {
  for (const [index, { number, checksum }] of applied.entries()) {
    const ours = migrations[index];
    if (!ours) throw new Error(`the database has migration ${number}, which this release does not know`);
    if (ours.number !== number || ours.checksum !== checksum) {
      throw new Error(`migration ${number} was applied with another content than this release has`);
    }
  }
}

async function apply(client: PoolClient, migration: Migration): Promise<void> {
  await client.query("begin");
  try {
    await client.query(migration.sql);
    await client.query("insert into schema_migrations (number, name, checksum) values ($1, $2, $3)", [
      migration.number,
      migration.name,
      migration.checksum,
    ]);
    await client.query("commit");
  } catch (cause) {
    await client.query("rollback");
    throw new Error(`migration ${migration.number} (${migration.name}) failed`, { cause });
  }
}
