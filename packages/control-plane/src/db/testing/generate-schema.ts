/** `npm run generate -w packages/control-plane`: writes ../schema.ts from a freshly migrated server. See schema-types.ts. */
import { chmod, mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import path from "node:path";
import { Pool } from "pg";
import { DEFAULT_UID, startPostgres, stopPostgres } from "../embedded-postgres.ts";
import { MIGRATIONS_DIR, migrate, readMigrations } from "../migrate.ts";
import { generateSchemaTypes } from "./schema-types.ts";

const root = await mkdtemp(path.join(tmpdir(), "rookery-schema-"));
await chmod(root, 0o755);
const home = path.join(root, "home");
try {
  const { url } = await startPostgres({
    home,
    socketDir: path.join(root, "s"),
    uid: process.getuid?.() === 0 ? DEFAULT_UID : undefined,
    timeoutMs: 60_000,
    diesWithParent: true,
  });
  const pool = new Pool({ connectionString: url, max: 1 });
  await migrate(pool, await readMigrations(MIGRATIONS_DIR));
  await pool.end();
  await generateSchemaTypes(url, path.join(import.meta.dirname, "../schema.ts"));
} finally {
  await stopPostgres(home, 10_000);
  await rm(root, { recursive: true, force: true });
}
