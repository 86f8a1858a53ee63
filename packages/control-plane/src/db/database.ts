/**
 * The connection to PostgreSQL, and the two kinds of failure it has: a database
 * that is away (`unavailable`, worth another try) and a bug of ours.
 *
 * int8 comes as bigint; times are Dates of whole milliseconds.
 */
import { RookeryError } from "@rookery/protocol/errors";
import { Kysely, PostgresDialect, sql } from "kysely";
import { Client, DatabaseError, Pool, TypeOverrides } from "pg";
import type { TeamId } from "../model/ids.ts";
import { lastEventsOf } from "./sandbox-events.ts";
import type { DB } from "./schema.ts";
import { TeamNews } from "./team-news.ts";

/** Who changed the events of a team says so to `news`, after the commit. */
export type Database = Kysely<DB> & { news: TeamNews };
/** A query function takes either: it never begins a transaction of its own unless its name says so. */
export type Queryable = Kysely<DB> & { news?: TeamNews };

export interface OpenDatabase {
  db: Database;
  /** For what is no query: migrations and readiness. */
  pool: Pool;
  close: () => Promise<void>;
}

const INT8_OID = 20;

const types = new TypeOverrides();
types.setTypeParser(INT8_OID, BigInt);

export interface DatabaseOptions {
  url: string;
  maxConnections: number;
  connectTimeoutMs: number;
  statementTimeoutMs: number;
  /** An idle connection that broke, news that was not told: logged, never fatal. */
  onError: (cause: unknown, words: string) => void;
  /** What connections are made of; a simulated run has its own. */
  Client?: typeof Client | undefined;
}

export function openDatabase(options: DatabaseOptions): OpenDatabase {
  const { Client: DatabaseClient = Client } = options;
  const pool = new Pool({
    Client: DatabaseClient,
    connectionString: options.url,
    max: options.maxConnections,
    connectionTimeoutMillis: options.connectTimeoutMs,
    statement_timeout: options.statementTimeoutMs,
    idle_in_transaction_session_timeout: options.statementTimeoutMs,
    application_name: "rookery-control-plane",
    types,
  });
  pool.on("error", (cause) => options.onError(cause, "an idle connection to the database broke"));
  // A client that is being closed has left the pool's care, and its last error would be nobody's.
  pool.on("connect", (client) => client.on("error", () => undefined));
  const queries = new Kysely<DB>({ dialect: new PostgresDialect({ pool }) });
  const news = new TeamNews({
    Client: DatabaseClient,
    url: options.url,
    notify: async (channel, payload) => {
      await sql`select pg_notify(${channel}, ${payload})`.execute(queries);
    },
    lastEvents: (teamIds) => lastEventsOf(queries, teamIds),
    onError: options.onError,
  });
  const db: Database = Object.assign(queries, { news });
  const close = async (): Promise<void> => {
    await news.settled();
    await db.destroy();
    // Kysely leaves a pool alone that it never asked.
    if (!pool.ended) await pool.end();
  };
  return { db, pool, close };
}

/** For statements of their own, which have committed. Whoever has a transaction tells by himself, after it. */
export function tellNews(db: Queryable, teamId: TeamId | undefined): void {
  if (teamId !== undefined && !db.isTransaction) db.news?.tell(teamId);
}

/** Constraint that an insert or update broke, if that is what `cause` says. */
export function violatedConstraint(cause: unknown): string | undefined {
  return cause instanceof DatabaseError && cause.code?.startsWith("23") ? cause.constraint : undefined;
}

const AWAY_SQLSTATES = /^(08|57P|53300|53400|40001|40P01|55P03|57014)/;
const AWAY_SYSCALLS = new Set(["ECONNREFUSED", "ECONNRESET", "ENOENT", "ETIMEDOUT", "EPIPE", "EACCES"]);
/** pg has no code for these. */
const AWAY_MESSAGES =
  /^(Connection terminated|timeout exceeded when trying to connect|Client has encountered)/;

/** True when the database, and not the question, is at fault. */
export function isDatabaseAway(cause: unknown): boolean {
  if (!(cause instanceof Error)) return false;
  const code = "code" in cause && typeof cause.code === "string" ? cause.code : "";
  if (cause instanceof DatabaseError) return AWAY_SQLSTATES.test(code);
  return AWAY_SYSCALLS.has(code) || AWAY_MESSAGES.test(cause.message);
}

/** For the border of the services: what callers see of a database that is away. */
export function asDatabaseError(cause: unknown): unknown {
  if (!isDatabaseAway(cause)) return cause;
  return new RookeryError("unavailable", "The database can't be reached; try again shortly.", { cause });
}
