/**
 * What happened to sandboxes: one event for each change of a status, written by
 * the database in the statement that makes the change (migration 5).
 *
 * Events are numbered per team, in the order in which their transactions
 * commit, without gaps: a number is counted up in the team's row, which stays
 * locked until the commit. So whoever has read up to a number has missed
 * nothing below it, and a gap says that something was deleted (ADR 17). They
 * are kept for a while, and deleted from the oldest on.
 */
import { RookeryError } from "@rookery/protocol/errors";
import { type Selectable, sql } from "kysely";
import type { HostId, SandboxId, TeamId } from "../model/ids.ts";
import type { SandboxStatus } from "../model/sandbox.ts";
import type { Queryable } from "./database.ts";
import { interval } from "./interval.ts";
import type { PageRequest, Paged } from "./page.ts";
import type { SandboxEvents } from "./schema.ts";

export interface SandboxEventRecord {
  /** Counts in its team. */
  number: bigint;
  sandboxId: SandboxId;
  /** Absent: it came into being. */
  previousStatus?: SandboxStatus;
  status: SandboxStatus;
  /** Why, where nobody asked for it: `expired`, `host_silent`, …; hosts may have reasons of their own. */
  reason?: string;
  error?: { code: string; message: string };
  hostId?: HostId;
  createdAt: Date;
}

/** Newest first. The sandbox has to be this team's. */
export async function listSandboxEvents(
  db: Queryable,
  sandboxId: SandboxId,
  { limit, cursor }: PageRequest,
): Promise<Paged<SandboxEventRecord>> {
  let query = db.selectFrom("sandbox_events").selectAll().where("sandbox_id", "=", sandboxId);
  if (cursor !== undefined) query = query.where("number", "<", numberOf(cursor));
  const rows = await query
    .orderBy("number", "desc")
    .limit(limit + 1)
    .execute();
  const items = rows.slice(0, limit).map(toEvent);
  const last = items.at(-1);
  return rows.length > limit && last ? { items, nextCursor: `${last.number}` } : { items };
}

function numberOf(cursor: string): bigint {
  if (/^\d{1,18}$/.test(cursor)) return BigInt(cursor);
  throw new RookeryError("invalid_request", "The cursor is not one that this list has answered.", {
    details: { field: "cursor", reason: "not a cursor" },
  });
}

/** Oldest first: what a reader who has had everything up to `after` has still to read. */
export async function sandboxEventsAfter(
  db: Queryable,
  of: { teamId: TeamId; sandboxId?: SandboxId | undefined },
  after: bigint,
  limit: number,
): Promise<SandboxEventRecord[]> {
  let query = db.selectFrom("sandbox_events").selectAll().where("number", ">", after);
  query = of.sandboxId
    ? query.where("sandbox_id", "=", of.sandboxId)
    : query.where("team_id", "=", of.teamId);
  return (await query.orderBy("number").limit(limit).execute()).map(toEvent);
}

/**
 * Where a team's events stand: the number of the last one, of the oldest that is
 * kept (one after the last, where none is), both of one moment.
 */
export async function rangeOfEvents(
  db: Queryable,
  teamId: TeamId,
): Promise<{ oldest: bigint; last: bigint }> {
  const { rows } = await sql<{ oldest: bigint; last: bigint }>`
    select last_event as last,
           coalesce((select min(number) from sandbox_events where team_id = teams.id), last_event + 1) as oldest
      from teams where id = ${teamId}`.execute(db);
  return rows[0] ?? { oldest: 1n, last: 0n };
}

/** Those of these teams that have news: the number of the last event is not the one that is known. */
export async function lastEventsOf(db: Queryable, teamIds: readonly TeamId[]): Promise<Map<TeamId, bigint>> {
  const rows = await db
    .selectFrom("teams")
    .select(["id", "last_event"])
    .where(sql<boolean>`id = any(${teamIds})`)
    .execute();
  return new Map(rows.map((row) => [row.id, row.last_event]));
}

/** How many were deleted, of at most `limit`, the oldest first. */
export async function dropOldSandboxEvents(
  db: Queryable,
  { keepMs, limit }: { keepMs: number; limit: number },
): Promise<number> {
  const { rows } = await sql<{ number: bigint }>`
    delete from sandbox_events where ctid = any(array(
      select ctid from sandbox_events where created_at < now() - ${interval(keepMs)}
       order by created_at limit ${limit}))
    returning number`.execute(db);
  return rows.length;
}

function toEvent(row: Selectable<SandboxEvents>): SandboxEventRecord {
  return {
    number: row.number,
    sandboxId: row.sandbox_id,
    previousStatus: row.previous_status ?? undefined,
    status: row.status,
    reason: row.reason ?? undefined,
    error:
      row.error_code === null || row.error_message === null
        ? undefined
        : { code: row.error_code, message: row.error_message },
    hostId: row.host_id ?? undefined,
    createdAt: row.created_at,
  };
}
