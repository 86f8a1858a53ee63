/**
 * `control-plane serve | migrate | bootstrap [--new-key] | reseal`.
 *
 * The only reader of the environment. It runs as any uid, and needs no root.
 */
import { existsSync } from "node:fs";
import path from "node:path";
import { parseArgs } from "node:util";
import pino, { type Logger } from "pino";
import { buildApi } from "./api/app.ts";
import { type Config, parseConfig } from "./config.ts";
import { openControlPlane } from "./control-plane.ts";
import { openDatabase } from "./db/database.ts";
import { MIGRATIONS_DIR, migrate, readMigrations } from "./db/migrate.ts";
import { reseal } from "./service/reseal.ts";
import { bootstrap } from "./service/teams-and-keys.ts";

const VERSION = "0.1.0";

async function main(): Promise<void> {
  const { positionals, values } = parseArgs({
    allowPositionals: true,
    options: { "new-key": { type: "boolean", default: false } },
  });
  const config = parseConfig(process.env);
  // stdout is for answers; the log is on stderr, written as it comes.
  const log = pino({ level: config.logLevel }, pino.destination({ fd: 2, sync: false }));
  switch (positionals[0]) {
    case "serve":
      return serve(config, log);
    case "migrate":
      return runMigrate(config);
    case "bootstrap":
      return runBootstrap(config, log, values["new-key"]);
    case "reseal":
      return runReseal(config, log);
    default:
      throw new Error("say serve, migrate, bootstrap or reseal");
  }
}

async function serve(config: Config, log: Logger): Promise<void> {
  if (process.getuid?.() === 0) log.warn({}, "running as root, which the control plane never needs");
  const plane = await openControlPlane(config, log);
  const api = await buildApi(plane.services, {
    logger: log,
    version: VERSION,
    limits: { requestsPerMinute: config.requestsPerMinute },
    assets: bundledAssets(),
    metrics: plane.metrics,
    reach: plane.reach,
  });
  await api.listen({ host: config.host, port: config.port });
  plane.start();
  const signal = await new Promise<string>((resolve) => {
    for (const name of ["SIGTERM", "SIGINT"]) process.once(name, () => resolve(name));
  });
  log.info({ signal }, "ending: no new requests, those under way may finish");
  // What is not finished by then is settled by another replica, or by our next start.
  const hardEnd = setTimeout(() => {
    log.warn({}, "requests were cut short");
    api.cutShort();
    log.flush();
    // For the answers to get out.
    setTimeout(() => process.exit(0), 250);
  }, config.shutdownMs);
  await api.close();
  await plane.close();
  clearTimeout(hardEnd);
}

async function runMigrate(config: Config): Promise<void> {
  const database = openDatabase({
    url: config.databaseUrl,
    maxConnections: 1,
    connectTimeoutMs: 10_000,
    statementTimeoutMs: 0,
    onError: (cause) => console.error(cause),
  });
  try {
    const applied = await migrate(database.pool, await readMigrations(MIGRATIONS_DIR));
    console.log(JSON.stringify({ applied }));
  } finally {
    await database.close();
  }
}

async function runBootstrap(config: Config, log: Logger, newKey: boolean): Promise<void> {
  const plane = await openControlPlane(config, log);
  try {
    const { team, key } = await bootstrap(plane.deps, { newKey });
    console.log(JSON.stringify({ team_id: team.id, api_key: key }));
  } finally {
    await plane.close();
  }
}

async function runReseal(config: Config, log: Logger): Promise<void> {
  const plane = await openControlPlane(config, log);
  try {
    console.log(JSON.stringify({ resealed: await reseal(plane.deps.db, plane.deps.sealer, plane.reach) }));
  } finally {
    await plane.close();
  }
}

/** Beside the bundle; in the source tree the API knows by itself. */
function bundledAssets(): { pages: string; swaggerUi: string } | undefined {
  const assets = path.join(import.meta.dirname, "assets");
  if (!existsSync(assets)) return undefined;
  return { pages: path.join(assets, "pages"), swaggerUi: path.join(assets, "swagger-ui") };
}

try {
  await main();
} catch (cause) {
  for (let error: unknown = cause; error !== undefined;) {
    console.error(error instanceof Error ? error.message : error);
    error = error instanceof Error ? error.cause : undefined;
  }
  process.exitCode = 1;
}
