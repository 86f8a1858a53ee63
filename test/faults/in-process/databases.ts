/**
 * Migrated databases on one server, each used by one run after the other: to
 * empty one costs a fraction of making one.
 */
import { join } from "node:path";
import { Client } from "pg";
import { z } from "zod";
import { Backends } from "./backends.ts";

const OWNER = "rookery";
const SOCKET = ".s.PGSQL.5432";
const TERMINATION_MS = 30_000;

export interface Server {
  socketDir: string;
  template: string;
}

/** A database of a run's own. */
export interface LentDatabase {
  url: string;
  backends: Backends;
  /** Looks at it from behind. */
  observer: Observer;
}

interface Kept extends LentDatabase {
  /** SQL that makes it what it was when it was new. */
  renewal: string;
}

/** A connection on which one question follows the other, whoever asks. */
class Observer {
  readonly #client: Client;
  #last: Promise<unknown>;

  constructor(url: string) {
    this.#client = new Client({ connectionString: url });
    this.#last = this.#client.connect();
  }

  async ask(text: string, values: unknown[] = []): Promise<unknown[]> {
    const mine = this.#last.then(() => this.#client.query<Record<string, unknown>>(text, values));
    this.#last = mine.catch(() => undefined);
    return (await mine).rows;
  }

  /** Several statements at once. */
  async run(script: string): Promise<void> {
    const mine = this.#last.then(() => this.#client.query(script));
    this.#last = mine.catch(() => undefined);
    await mine;
  }

  async end(): Promise<void> {
    await this.#last;
    await this.#client.end();
  }
}

export class Databases implements AsyncDisposable {
  readonly #server: Server;
  readonly #idle: Kept[] = [];
  readonly #all: Kept[] = [];
  #made = 0;

  constructor(server: Server) {
    this.#server = server;
  }

  async take(): Promise<LentDatabase> {
    return this.#idle.pop() ?? (await this.#make());
  }

  /** When its run is over and nobody is connected any more: nothing of it stays. */
  async giveBack(lent: LentDatabase): Promise<void> {
    const kept = this.#all.find(({ url }) => url === lent.url);
    if (kept === undefined) throw new Error("this database is none of these");
    await kept.observer.run(kept.renewal);
    this.#idle.push(kept);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const { backends } of this.#all) backends.close();
    await Promise.all(this.#all.map(({ observer }) => observer.end()));
  }

  async #make(): Promise<Kept> {
    const { socketDir, template } = this.#server;
    this.#made += 1;
    const name = `faults_${process.pid}_${this.#made}`;
    const admin = new Observer(urlOf(socketDir, "postgres"));
    await admin.run(`create database ${name} template ${template}`);
    await admin.end();
    const url = urlOf(socketDir, name);
    const observer = new Observer(url);
    const backends = new Backends(join(socketDir, SOCKET), async (pids) => {
      await observer.ask(`select pg_terminate_backend(pid, ${TERMINATION_MS}) from unnest($1::int[]) pid`, [
        pids,
      ]);
    });
    const kept: Kept = { url, observer, backends, renewal: await renewalOf(observer) };
    this.#all.push(kept);
    return kept;
  }
}

const tableName = z.object({ table: z.string() });

/**
 * What migrations put in is set aside, and comes back. Rows are deleted one by
 * one, without triggers: a truncated table is a new one, for which every
 * statement has to be planned anew.
 */
async function renewalOf(observer: Observer): Promise<string> {
  const rows = await observer.ask(
    `select quote_ident(tablename) as table from pg_tables
      where schemaname = 'public' and tablename <> 'schema_migrations'`,
  );
  const tables = rows.map((row) => tableName.parse(row).table);
  const filled: string[] = [];
  await observer.run("create schema pristine");
  for (const table of tables) {
    if ((await observer.ask(`select from ${table} limit 1`)).length === 0) continue;
    await observer.run(`create table pristine.${table} as table ${table}`);
    filled.push(table);
  }
  return [
    "set session_replication_role = replica",
    ...tables.map((table) => `delete from ${table}`),
    ...filled.map((table) => `insert into ${table} select * from pristine.${table}`),
    "reset session_replication_role",
  ].join(";\n");
}

function urlOf(socketDir: string, database: string): string {
  return `postgresql://${OWNER}@localhost/${database}?host=${encodeURIComponent(socketDir)}`;
}
