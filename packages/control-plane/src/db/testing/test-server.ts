/**
 * A real server for tests, with a migrated database to copy: its own uid, its
 * own directories, gone at the end. Were the run killed, the kernel ends the
 * server, and the next run removes what is left.
 */
import { chmod, mkdir, mkdtemp, readdir, rm, stat } from "node:fs/promises";
import { tmpdir } from "node:os";
import path from "node:path";
import { Client, Pool } from "pg";
import { DEFAULT_UID, startPostgres, stopPostgres, postgresPid, urlOf } from "../embedded-postgres.ts";
import { MIGRATIONS_DIR, migrate, readMigrations } from "../migrate.ts";

export const TEMPLATE_DATABASE = "rookery_template";
const PREFIX = "rookery-pg-test-";

export interface TestServer {
  socketDir: string;
  template: string;
  stop(): Promise<void>;
}

export async function startTestServer(settings: Readonly<Record<string, string>> = {}): Promise<TestServer> {
  await removeLeftovers();
  const root = await mkdtemp(path.join(tmpdir(), PREFIX));
  // mkdtemp makes it 0700, and the server's uid has to pass through it.
  const home = path.join(root, "home");
  const socketDir = path.join(root, "s");
  await chmod(root, 0o755);
  await mkdir(home);
  await startPostgres({
    home,
    socketDir,
    uid: process.getuid?.() === 0 ? DEFAULT_UID : undefined,
    timeoutMs: 60_000,
    diesWithParent: true,
    settings: { max_connections: "200", ...settings },
  });
  await makeTemplate(socketDir);
  return {
    socketDir,
    template: TEMPLATE_DATABASE,
    stop: async () => {
      await stopPostgres(home, 10_000);
      await rm(root, { recursive: true, force: true });
    },
  };
}

async function makeTemplate(socketDir: string): Promise<void> {
  const admin = new Client({ connectionString: urlOf(socketDir, "postgres") });
  await admin.connect();
  await admin.query(`create database ${TEMPLATE_DATABASE}`);
  await admin.end();
  const pool = new Pool({ connectionString: urlOf(socketDir, TEMPLATE_DATABASE), max: 1 });
  await migrate(pool, await readMigrations(MIGRATIONS_DIR));
  await pool.end();
}

async function removeLeftovers(): Promise<void> {
  for (const name of await readdir(tmpdir())) {
    if (!name.startsWith(PREFIX)) continue;
    const root = path.join(tmpdir(), name);
    if ((await postgresPid(path.join(root, "home"))) !== undefined) continue;
    // Another run may be about to start its server there, or to remove it.
    const found = await stat(root).catch(() => undefined);
    if (found !== undefined && Date.now() - found.mtimeMs > 600_000)
      await rm(root, { recursive: true, force: true });
  }
}
