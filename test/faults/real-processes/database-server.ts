/** The embedded PostgreSQL of a run: the real server, which may be ended, killed, or stand still. */
import { existsSync, readdirSync, readFileSync, symlinkSync, writeFileSync } from "node:fs";
import { cp } from "node:fs/promises";
import { randomBytes } from "node:crypto";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { Client } from "pg";
import {
  OWNER,
  postgresPid,
  startPostgres,
  stopPostgres,
  urlOf,
} from "../../../packages/control-plane/src/db/embedded-postgres.ts";
import { openDatabase } from "../../../packages/control-plane/src/db/database.ts";
import { MIGRATIONS_DIR, migrate, readMigrations } from "../../../packages/control-plane/src/db/migrate.ts";
import { type Cluster, openCluster } from "../../../packages/control-plane/src/hosts/cluster.ts";
import { newIds } from "../../../packages/control-plane/src/model/new-ids.ts";
import { newSealer } from "../../../packages/control-plane/src/model/sealer.ts";
import { observeRows } from "../observe-rows.ts";
import type { Observed } from "../world.ts";
import { run } from "./enclosure.ts";
import { DATABASE_PORT, SECRET_KEY, SERVICE_UID } from "./settings.ts";

const START_LIMIT_MS = 60_000;
const STOP_LIMIT_MS = 20_000;

/** What a server is copied from, so that a run begins with a migrated database. */
export interface DatabaseTemplate {
  home: string;
  cluster: Cluster;
}

export async function makeTemplate(home: string): Promise<DatabaseTemplate> {
  const place = { home, socketDir: join(home, "socket"), uid: SERVICE_UID };
  const { url } = await startPostgres({ ...place, timeoutMs: START_LIMIT_MS, settings: { fsync: "off" } });
  const { db, pool, close } = openDatabase({
    url,
    maxConnections: 1,
    connectTimeoutMs: START_LIMIT_MS,
    statementTimeoutMs: 0,
    onError: () => undefined,
  });
  try {
    await migrate(pool, await readMigrations(MIGRATIONS_DIR));
    const deps = {
      sealer: newSealer(SECRET_KEY, randomBytes, []),
      ids: newIds(randomBytes),
      random: randomBytes,
    };
    return { home, cluster: await openCluster(db, deps) };
  } finally {
    await close();
    await stopPostgres(home, STOP_LIMIT_MS);
  }
}

export class DatabaseServer implements AsyncDisposable {
  readonly #home: string;
  readonly #address: string;
  /** Starts and stops come one after the other. */
  #turn: Promise<void> = Promise.resolve();

  private constructor(home: string, address: string) {
    this.#home = home;
    this.#address = address;
  }

  static async start(template: DatabaseTemplate, home: string, address: string): Promise<DatabaseServer> {
    await cp(join(template.home, "data"), join(home, "data"), { recursive: true, preserveTimestamps: true });
    for (const name of readdirSync(template.home)) {
      if (name.startsWith("server-")) symlinkSync(join(template.home, name), join(home, name));
    }
    writeFileSync(join(home, "hba.conf"), "local all all trust\nhost all all 10.0.0.0/8 trust\n", {
      mode: 0o644,
    });
    ownAll(join(home, "data"));
    const server = new DatabaseServer(home, address);
    await server.#start();
    return server;
  }

  get url(): string {
    return `postgresql://${OWNER}@${this.#address}:${DATABASE_PORT}/${OWNER}`;
  }

  /** In order, or in the middle of everything; up again after `ms`. */
  async restart(how: "in-order" | "by-force", ms: number): Promise<void> {
    await this.#next(async () => {
      if (how === "in-order") await stopPostgres(this.#home, STOP_LIMIT_MS);
      else await this.#kill();
      await sleep(ms);
      await this.#start();
    });
  }

  /** All its processes stand still. */
  async stall(ms: number): Promise<void> {
    await this.#next(async () => {
      const pids = await this.#pids();
      for (const pid of pids) signal(pid, "SIGSTOP");
      await sleep(ms);
      for (const pid of pids) signal(pid, "SIGCONT");
    });
  }

  async breakConnections(): Promise<void> {
    await this.#ask(`select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid()
       and datname is not null`).catch(() => undefined); // it is down: there are none
  }

  async observe(): Promise<Omit<Observed, "machines">> {
    return await observeRows((text) => this.#ask(text));
  }

  /** What was begun with it is over, and it runs. */
  async settled(): Promise<void> {
    await this.#turn;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#turn;
    await this.#kill();
  }

  async #next(work: () => Promise<void>): Promise<void> {
    const mine = this.#turn.then(work);
    this.#turn = mine.catch(() => undefined);
    await mine;
  }

  async #start(): Promise<void> {
    await startPostgres({
      home: this.#home,
      socketDir: this.#socketDir,
      uid: SERVICE_UID,
      timeoutMs: START_LIMIT_MS,
      settings: {
        listen_addresses: this.#address,
        hba_file: join(this.#home, "hba.conf"),
        max_connections: "100",
        // Its memory is the machine's, which does not fail here: what it told it has, it keeps after a kill.
        fsync: "off",
      },
    });
  }

  async #kill(): Promise<void> {
    const pids = await this.#pids();
    for (const pid of pids) signal(pid, "SIGKILL");
    while ((await postgresPid(this.#home)) !== undefined) await sleep(20);
  }

  /** The server first, then its children. */
  async #pids(): Promise<number[]> {
    const server = await postgresPid(this.#home);
    if (server === undefined) return [];
    const path = `/proc/${server}/task/${server}/children`;
    const children = existsSync(path) ? readFileSync(path, "utf8").trim().split(" ").filter(Boolean) : [];
    return [server, ...children.map(Number)];
  }

  get #socketDir(): string {
    return join(this.#home, "socket");
  }

  async #ask(text: string): Promise<unknown[]> {
    const client = new Client({ connectionString: urlOf(this.#socketDir, OWNER) });
    client.on("error", () => undefined); // whoever asks is told by the query
    await client.connect();
    try {
      return (await client.query(text)).rows;
    } finally {
      await client.end();
    }
  }
}

function signal(pid: number, name: NodeJS.Signals): void {
  try {
    process.kill(pid, name);
  } catch (cause) {
    if (!(cause instanceof Error && "code" in cause && cause.code === "ESRCH")) throw cause;
  }
}

function ownAll(dir: string): void {
  run("chown", "-R", `${SERVICE_UID}:${SERVICE_UID}`, dir);
}
