/**
 * The database of a fleet: a migrated one of its own on the tests' server, which
 * each program reaches through a link in the file system, so that it can be
 * taken away from all of them.
 */
import { mkdirSync, rmSync, symlinkSync } from "node:fs";
import { join } from "node:path";
import { Client } from "pg";

const SOCKET = ".s.PGSQL.5432";
const OWNER = "rookery";

export interface Server {
  socketDir: string;
  template: string;
}

export class FleetDatabase implements AsyncDisposable {
  readonly #server: Server;
  readonly #name: string;
  readonly #dir: string;
  readonly #client: Client;

  private constructor(server: Server, name: string, dir: string) {
    this.#server = server;
    this.#name = name;
    this.#dir = dir;
    this.#client = new Client({ connectionString: urlOf(server.socketDir, name), application_name: "test" });
  }

  static async create(server: Server, name: string, dir: string): Promise<FleetDatabase> {
    await asAdmin(server, (admin) => admin.query(`create database ${name} template ${server.template}`));
    const database = new FleetDatabase(server, name, dir);
    mkdirSync(dir, { recursive: true });
    database.comeBack();
    await database.#client.connect();
    return database;
  }

  /** What programs connect with. */
  get url(): string {
    return urlOf(this.#dir, this.#name);
  }

  /** For what no program does, such as making time pass. */
  async execute<T = unknown>(text: string, values: unknown[] = []): Promise<T[]> {
    return (await this.#client.query(text, values)).rows as T[];
  }

  /** Takes all rows of these tables, as a backup has them. */
  async copyFrom(other: FleetDatabase, tables: readonly string[]): Promise<void> {
    for (const table of tables) {
      const [rows] = await other.execute<{ all: unknown }>(
        `select coalesce(json_agg(t), '[]')::text as all from ${table} t`,
      );
      await this.execute(`delete from ${table}`);
      await this.execute(
        `insert into ${table} select * from json_populate_recordset(null::${table}, $1::json)`,
        [rows?.all],
      );
    }
  }

  /** All connections break, and no new ones are taken. */
  async goAway(): Promise<void> {
    rmSync(join(this.#dir, SOCKET), { force: true });
    await this.execute(
      `select pg_terminate_backend(pid) from pg_stat_activity
        where datname = current_database() and application_name <> 'test'`,
    );
  }

  comeBack(): void {
    symlinkSync(join(this.#server.socketDir, SOCKET), join(this.#dir, SOCKET));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#client.end();
    await asAdmin(this.#server, (admin) => admin.query(`drop database ${this.#name} with (force)`));
  }
}

function urlOf(socketDir: string, database: string): string {
  return `postgresql://${OWNER}@localhost/${database}?host=${encodeURIComponent(socketDir)}`;
}

async function asAdmin(server: Server, work: (admin: Client) => Promise<unknown>): Promise<void> {
  const admin = new Client({ connectionString: urlOf(server.socketDir, "postgres") });
  await admin.connect();
  try {
    await work(admin);
  } finally {
    await admin.end();
  }
}
