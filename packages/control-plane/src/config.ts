/**
 * Configuration: read from the environment once, by main.ts, into one frozen
 * object. Every interval is here, so that tests can shorten it.
 */
import { isAbsolute } from "node:path";
import { z } from "zod";
import { STRATEGY_NAMES } from "./hosts/scheduler.ts";

const SECOND = 1_000;
const DAY = 86_400 * SECOND;

const SECRET_KEY_RULE = "must be at least 32 characters that nobody can guess";

const ms = (normal: number) =>
  z.coerce
    .number()
    .int()
    .min(1)
    .max(365 * DAY)
    .default(normal);
const count = (normal: number, max: number) => z.coerce.number().int().min(1).max(max).default(normal);

const Environment = z.object({
  DATABASE_URL: z.string("must name the PostgreSQL server: postgresql://user@host/database").min(1),
  ROOKERY_SECRET_KEY: z.string(SECRET_KEY_RULE).min(32, SECRET_KEY_RULE),
  /** While keys change: the one before or the next; opens what it sealed, and seals nothing. */
  ROOKERY_SECRET_KEY_OTHER: z.string().min(32, SECRET_KEY_RULE).optional(),
  ROOKERY_HOST: z.string().min(1).default("127.0.0.1"),
  ROOKERY_PORT: z.coerce.number().int().min(0).max(65_535).default(8080),
  ROOKERY_LOG_LEVEL: z.enum(["trace", "debug", "info", "warn", "error", "fatal", "silent"]).default("info"),
  ROOKERY_SCHEDULER: z.enum(STRATEGY_NAMES).default("round-robin"),
  ROOKERY_DATABASE_CONNECTIONS: count(20, 1_000),
  ROOKERY_MAX_SANDBOXES_PER_TEAM: count(1_000, 10_000_000),
  ROOKERY_REQUESTS_PER_MINUTE: z.coerce.number().int().min(0).default(60_000),

  ROOKERY_CREATE_MS: ms(180 * SECOND),
  ROOKERY_PAUSE_MS: ms(120 * SECOND),
  ROOKERY_RESUME_MS: ms(120 * SECOND),
  ROOKERY_DESTROY_MS: ms(60 * SECOND),
  ROOKERY_SNAPSHOT_MS: ms(180 * SECOND),
  ROOKERY_OPERATION_LEASE_MS: ms(30 * SECOND),
  ROOKERY_SWEEP_MS: ms(SECOND),
  ROOKERY_HOST_CHECK_MS: ms(30 * SECOND),
  ROOKERY_HOST_CHECK_LIMIT_MS: ms(10 * SECOND),
  ROOKERY_HOST_COMPARE_MS: ms(600 * SECOND),
  ROOKERY_HOST_SILENT_MS: ms(90 * SECOND),
  ROOKERY_STRANGER_KEEP_MS: ms(DAY),
  ROOKERY_EVENT_LEASE_MS: ms(15 * SECOND),
  ROOKERY_EVENT_KEEP_MS: ms(7 * DAY),
  ROOKERY_NEWS_POLL_MS: ms(SECOND),
  ROOKERY_STREAMS_PER_TEAM: count(100, 100_000),
  ROOKERY_REGISTRATION_TOKEN_MS: ms(3_600 * SECOND),
  ROOKERY_ACCESS_TOKEN_MS: ms(7 * DAY),
  ROOKERY_REFRESH_TOKEN_MS: ms(60 * DAY),
  ROOKERY_SHUTDOWN_MS: ms(8 * SECOND),
  /** For tests alone: a directory whose `failpoints.json` arms failpoints, and that gets `failpoint-hits`. */
  ROOKERY_FAILPOINTS_DIR: z.string().refine(isAbsolute, "must be an absolute path").optional(),
});

export type Config = ReturnType<typeof parseConfig>;

export function parseConfig(environment: Readonly<Record<string, string | undefined>>) {
  const parsed = Environment.safeParse(environment);
  if (!parsed.success) {
    const issues = parsed.error.issues.map(({ path, message }) => `${path.join(".")}: ${message}`);
    throw new Error(`the environment is not usable:\n  ${issues.join("\n  ")}`);
  }
  const env = parsed.data;
  return Object.freeze({
    databaseUrl: env.DATABASE_URL,
    databaseConnections: env.ROOKERY_DATABASE_CONNECTIONS,
    secretKey: env.ROOKERY_SECRET_KEY,
    otherSecretKeys: env.ROOKERY_SECRET_KEY_OTHER === undefined ? [] : [env.ROOKERY_SECRET_KEY_OTHER],
    host: env.ROOKERY_HOST,
    port: env.ROOKERY_PORT,
    logLevel: env.ROOKERY_LOG_LEVEL,
    scheduler: env.ROOKERY_SCHEDULER,
    requestsPerMinute: env.ROOKERY_REQUESTS_PER_MINUTE,
    shutdownMs: env.ROOKERY_SHUTDOWN_MS,
    failpointsDir: env.ROOKERY_FAILPOINTS_DIR,
    services: {
      maxSandboxesPerTeam: env.ROOKERY_MAX_SANDBOXES_PER_TEAM,
      createMs: env.ROOKERY_CREATE_MS,
      pauseMs: env.ROOKERY_PAUSE_MS,
      resumeMs: env.ROOKERY_RESUME_MS,
      destroyMs: env.ROOKERY_DESTROY_MS,
      snapshotMs: env.ROOKERY_SNAPSHOT_MS,
      leaseMs: env.ROOKERY_OPERATION_LEASE_MS,
      maxStreamsPerTeam: env.ROOKERY_STREAMS_PER_TEAM,
    },
    sweepMs: env.ROOKERY_SWEEP_MS,
    monitor: {
      everyMs: env.ROOKERY_HOST_CHECK_MS,
      limitMs: env.ROOKERY_HOST_CHECK_LIMIT_MS,
      compareEveryMs: env.ROOKERY_HOST_COMPARE_MS,
      silentMs: env.ROOKERY_HOST_SILENT_MS,
      strangerKeepMs: env.ROOKERY_STRANGER_KEEP_MS,
    },
    eventLeaseMs: env.ROOKERY_EVENT_LEASE_MS,
    eventKeepMs: env.ROOKERY_EVENT_KEEP_MS,
    newsPollMs: env.ROOKERY_NEWS_POLL_MS,
    credentials: {
      registrationMs: env.ROOKERY_REGISTRATION_TOKEN_MS,
      accessMs: env.ROOKERY_ACCESS_TOKEN_MS,
      refreshMs: env.ROOKERY_REFRESH_TOKEN_MS,
    },
  });
}
