/**
 * One database per run, copied from a migrated template on a real server, and
 * ways to lose it: replicas reach the server through a link in the file system
 * that can be taken away, and connections can be ended at the server.
 */
import { mkdirSync, rmSync, symlinkSync } from "node:fs";
import { join } from "node:path";
import { Client } from "pg";
import { observeRows } from "../observe-rows.ts";
import type { Observed } from "../world.ts";

const SOCKET = ".s.PGSQL.5432";
const OWNER = "rookery";

export interface Server {
  socketDir: string;
  template: string;
}

export class RunDatabase implements AsyncDisposable {
  readonly #server: Server;
  readonly #name: string;
  readonly #dir: string;
  readonly #links = new Set<string>();
  readonly #observer: Client;
  #isAway = false;
  #lastAnswer: Promise<unknown> = Promise.resolve();

  private constructor(server: Server, name: string, dir: string) {
    this.#server = server;
    this.#name = name;
    this.#dir = dir;
    this.#observer = new Client({
      connectionString: urlOf(server.socketDir, name),
      application_name: "observer",
    });
  }

  static async create(server: Server, name: string, dir: string): Promise<RunDatabase> {
    await asAdmin(server, (admin) => admin.query(`create database ${name} template ${server.template}`));
    const database = new RunDatabase(server, name, dir);
    database.#observer.on("error", () => undefined);
    await database.#observer.connect();
    return database;
  }

  /** For one incarnation of a replica: its own way to the server, and its own name there. */
  urlFor(replica: string): string {
    const dir = join(this.#dir, replica);
    mkdirSync(dir, { recursive: true });
    this.#links.add(dir);
    if (!this.#isAway) this.#link(dir);
    return `${urlOf(dir, this.#name)}&application_name=${replica}`;
  }

  /** A replica died: nothing of it reaches the server any more. */
  async cutOff(replica: string): Promise<void> {
    const dir = join(this.#dir, replica);
    this.#links.delete(dir);
    rmSync(dir, { recursive: true, force: true });
    await this.#ask(
      `select pg_terminate_backend(pid) from pg_stat_activity where datname = $1 and application_name = $2`,
      [this.#name, replica],
    );
  }

  /** All connections break. */
  async breakConnections(): Promise<void> {
    await this.#ask(
      `select pg_terminate_backend(pid) from pg_stat_activity where datname = $1 and application_name <> 'observer'`,
      [this.#name],
    );
  }

  async goAway(): Promise<void> {
    this.#isAway = true;
    for (const dir of this.#links) rmSync(join(dir, SOCKET), { force: true });
    await this.breakConnections();
  }

  comeBack(): void {
    if (!this.#isAway) return;
    this.#isAway = false;
    for (const dir of this.#links) this.#link(dir);
  }

  async observe(): Promise<Omit<Observed, "machines">> {
    return await observeRows(async (text) => (await this.#ask(text)).rows);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#observer.end();
    await asAdmin(this.#server, (admin) => admin.query(`drop database ${this.#name} with (force)`));
  }

  /** One after the other: a connection does one thing at a time. */
  async #ask(text: string, values: unknown[] = []): Promise<{ rows: unknown[] }> {
    const mine = this.#lastAnswer.then(() => this.#observer.query(text, values));
    this.#lastAnswer = mine.catch(() => undefined);
    return await mine;
  }

  #link(dir: string): void {
    symlinkSync(join(this.#server.socketDir, SOCKET), join(dir, SOCKET));
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
