/**
 * Sandboxes, read and moved.
 *
 * Invariants: a status changes in `moveSandbox`, and for a whole host in
 * sandboxes-of-host.ts, only, raising the generation; whatever enters a final
 * status leaves its team's count with it. No live row is on a deleted host:
 * whoever places one holds the host's row locked.
 *
 * Locks are taken in this order: host, sandbox, team, the host's digest. The
 * last is kept by triggers (migration 3, ADR 18), whatever changes a row.
 */
import assert from "node:assert/strict";
import { type Selectable, sql } from "kysely";
import type { HostId, SandboxId, SnapshotId, TeamId } from "../model/ids.ts";
import { type SandboxEvent, isFinal, isWork, nextStatus } from "../model/sandbox-state.ts";
import type { Lifetime, Sandbox, SandboxStatus, SandboxSummary } from "../model/sandbox.ts";
import { type Queryable, tellNews } from "./database.ts";
import type { HostEndpoint } from "./hosts.ts";
import { claimed } from "./claimed.ts";
import { interval } from "./interval.ts";
import { type PageRequest, type Paged, olderThan, toPage } from "./page.ts";
import type { Sandboxes } from "./schema.ts";

/** A sandbox with what only the control plane itself needs to know, as lists and the monitor read it. */
export interface SandboxSummaryRecord extends SandboxSummary {
  snapshotId?: SnapshotId;
  /** Of the last command sent to its host: what the host's events bear. */
  commandGeneration: bigint;
  operationDeadline?: Date;
  /** While `hostId` is told to bring it up: the host that keeps its paused copy until it runs there. */
  movingFrom?: HostId;
  /** Of its envd access token. */
  tokenVersion: number;
}

export interface SandboxRecord extends SandboxSummaryRecord, Sandbox {}

/** All but `env`, which may be large: whoever reads many rows leaves it where it is. */
const SUMMARY = [
  "id",
  "team_id",
  "status",
  "generation",
  "command_generation",
  "operation_deadline",
  "template",
  "snapshot_id",
  "host_id",
  "moving_from",
  "vcpus",
  "memory_mb",
  "disk_mb",
  "timeout_sec",
  "on_timeout",
  "timeout_mode",
  "metadata",
  "token_version",
  "disk_used_bytes",
  "error_code",
  "error_message",
  "created_at",
  "started_at",
  "expires_at",
  "ended_at",
] as const satisfies readonly (keyof Sandboxes)[];

/** Where a row stood when it was read: what a compare-and-set compares. */
export type At = Pick<SandboxRecord, "id" | "status" | "generation">;

export interface NewSandbox extends Lifetime {
  id: SandboxId;
  teamId: TeamId;
  template: string;
  snapshotId?: SnapshotId | undefined;
  hostId: HostId;
  vcpus: number;
  memoryMb: number;
  diskMb: number;
  env: Readonly<Record<string, string>>;
  metadata: Readonly<Record<string, string>>;
  deadlineMs: number;
}

/**
 * Admits it to its team's quota and to its host in one statement. No row: the
 * quota is used up, or the host takes no sandboxes any more.
 */
export async function insertSandbox(
  db: Queryable,
  input: NewSandbox,
  options: { defaultQuota: number },
): Promise<SandboxRecord | undefined> {
  const { rows } = await sql<Selectable<Sandboxes>>`
    with host as (${hostThatTakesMore(input.hostId)}),
    admitted as (
      update teams set live_sandboxes = live_sandboxes + 1
       where id = ${input.teamId} and live_sandboxes < coalesce(max_sandboxes, ${options.defaultQuota})
         and exists (select from host)
      returning id
    )
    insert into sandboxes (id, team_id, status, operation_deadline, template, snapshot_id, host_id, vcpus,
      memory_mb, disk_mb, timeout_sec, on_timeout, timeout_mode, env, metadata)
    select ${input.id}, id, 'starting', now() + ${interval(input.deadlineMs)}, ${input.template},
      ${input.snapshotId ?? null}, ${input.hostId}, ${input.vcpus}::int, ${input.memoryMb}::int, ${input.diskMb}::int,
      ${input.timeoutSec}::int, ${input.onTimeout}, ${input.timeoutMode}, ${JSON.stringify(input.env)}::jsonb,
      ${JSON.stringify(input.metadata)}::jsonb
      from admitted
    returning *`.execute(db);
  tellNews(db, rows[0]?.team_id);
  return rows[0] && toSandbox(rows[0]);
}

/**
 * Locked, so that it neither begins to drain nor is deleted before the row that
 * is placed on it can be seen. Heartbeats wait for that, a statement's time.
 */
function hostThatTakesMore(id: HostId) {
  return sql`select id from hosts
    where id = ${id} and status = 'online' and not draining and deleted_at is null for share`;
}

/** Its own host may drain: it only keeps what it has. */
function hostThatTakes(event: SandboxEvent, id: HostId) {
  if (event !== "moveBack") return hostThatTakesMore(id);
  return sql`select id from hosts where id = ${id} and deleted_at is null for share`;
}

const MAY_BE_MOVING: ReadonlySet<SandboxStatus> = new Set(["resuming", "missing", "stopping"]);

/** Why a sandbox is `missing`: its host went silent. */
export const HOST_SILENT = "host_silent";

/** What may change along with a status. What is absent stays; `error` is cleared unless given. */
export interface MovePatch {
  /** Needed for a status of work: from now, by the database's clock. */
  deadlineMs?: number;
  hostId?: HostId | null;
  /** Forgotten once it runs where it is, and when it ended. */
  movingFrom?: HostId;
  startedAt?: Date | undefined;
  expiresAt?: Date | null;
  diskUsedBytes?: number | undefined;
  /** What its host says that it was last told; a status of work sets it by itself. */
  commandGeneration?: bigint;
  error?: { code: string; message: string } | undefined;
  /** Why, where it was not asked for: for its event. */
  reason?: string | undefined;
}

/**
 * Compare-and-set: undefined means that the row moved first (or is gone), or
 * that the host that it was to be placed on takes none any more.
 */
export async function moveSandbox(
  db: Queryable,
  at: At,
  event: SandboxEvent,
  patch: MovePatch = {},
): Promise<SandboxRecord | undefined> {
  const status = nextStatus(at.status, event);
  assert(status, `${event} means nothing to a sandbox that is ${at.status}`);
  assert.equal(isWork(status), patch.deadlineMs !== undefined, `${status} needs a deadline, or has none`);
  const generation = at.generation + 1n;
  const { hostId, movingFrom, startedAt, expiresAt, diskUsedBytes, error, deadlineMs } = patch;
  const commandGeneration = isWork(status) && status !== "pending" ? generation : patch.commandGeneration;
  const moved = db.with("moved", (query) =>
    query
      .updateTable("sandboxes")
      .set({
        status,
        generation,
        operation_deadline: deadlineMs === undefined ? null : sql<Date>`now() + ${interval(deadlineMs)}`,
        error_code: error?.code ?? null,
        error_message: error?.message ?? null,
        status_reason: patch.reason ?? null,
        ...(commandGeneration !== undefined && { command_generation: commandGeneration }),
        ...(hostId !== undefined && { host_id: hostId }),
        ...(movingFrom && { moving_from: movingFrom }),
        ...(!MAY_BE_MOVING.has(status) && { moving_from: null }),
        ...(startedAt && { started_at: sql<Date>`coalesce(started_at, ${startedAt})` }),
        ...(expiresAt !== undefined && { expires_at: expiresAt }),
        ...(diskUsedBytes !== undefined && { disk_used_bytes: BigInt(diskUsedBytes) }),
        ...(isFinal(status) && { ended_at: sql<Date>`now()`, expires_at: null }),
      })
      .where("id", "=", at.id)
      .where("status", "=", at.status)
      .where("generation", "=", at.generation)
      .where(hostId ? sql<boolean>`exists (${hostThatTakes(event, hostId)})` : sql<boolean>`true`)
      .returningAll(),
  );
  const counted = isFinal(status)
    ? moved.with("freed", (query) =>
        query
          .updateTable("teams")
          .from("moved")
          .set((eb) => ({ live_sandboxes: eb("live_sandboxes", "-", 1) }))
          .whereRef("teams.id", "=", "moved.team_id")
          .returning("teams.id"),
      )
    : moved;
  let query = counted.selectFrom("moved").selectAll();
  // What a host said it will say again: were this commit lost, the row would be at work and be settled anew.
  // So only the beginning of work waits for the disk.
  if (!isWork(status)) query = query.select(sql`set_config('synchronous_commit', 'off', true)`.as("commit"));
  const row = await query.executeTakeFirst();
  tellNews(db, row?.team_id);
  return row && toSandbox(row);
}

/**
 * Its host was last told what it says, whatever we believed: so their digests
 * can agree. No change of status; nothing happens when the row moved.
 */
export async function adoptCommandGeneration(db: Queryable, at: At, told: bigint): Promise<void> {
  await db
    .updateTable("sandboxes")
    .set({ command_generation: told })
    .where("id", "=", at.id)
    .where("status", "=", at.status)
    .where("generation", "=", at.generation)
    .execute();
}

export async function findSandbox(
  db: Queryable,
  teamId: TeamId,
  id: SandboxId,
): Promise<SandboxRecord | undefined> {
  const row = await db
    .selectFrom("sandboxes")
    .selectAll()
    .where("id", "=", id)
    .where("team_id", "=", teamId)
    .executeTakeFirst();
  return row && toSandbox(row);
}

/** What a call into a guest needs, in one query: does it run, and where? */
export async function findSandboxTarget(
  db: Queryable,
  teamId: TeamId,
  id: SandboxId,
): Promise<{ status: SandboxStatus; host: HostEndpoint | undefined } | undefined> {
  const row = await db
    .selectFrom("sandboxes")
    .leftJoin("hosts", "hosts.id", "sandboxes.host_id")
    .select(["sandboxes.status", "hosts.id", "hosts.address", "hosts.certificate_fingerprint", "hosts.epoch"])
    .where("sandboxes.id", "=", id)
    .where("sandboxes.team_id", "=", teamId)
    .executeTakeFirst();
  if (!row) return undefined;
  const { status, id: hostId, address, certificate_fingerprint: fingerprint, epoch } = row;
  if (hostId === null || address === null || epoch === null) return { status, host: undefined };
  const host = { id: hostId, address, certificateFingerprint: fingerprint ?? undefined, epoch };
  return { status, host };
}

/** Of any team: for hosts' words about it. */
export async function findSandboxes(
  db: Queryable,
  ids: readonly SandboxId[],
): Promise<SandboxSummaryRecord[]> {
  if (ids.length === 0) return [];
  const rows = await db.selectFrom("sandboxes").select(SUMMARY).where("id", "in", ids).execute();
  return rows.map(toSummary);
}

export interface SandboxFilter {
  /** Empty: all that are not final. */
  statuses: readonly SandboxStatus[];
  metadata: Readonly<Record<string, string>>;
}

export async function listSandboxes(
  db: Queryable,
  teamId: TeamId,
  filter: SandboxFilter,
  page: PageRequest,
): Promise<Paged<SandboxSummaryRecord>> {
  let query = db
    .selectFrom("sandboxes")
    .select(SUMMARY)
    .where("team_id", "=", teamId)
    .where(olderThan(page.cursor, "sandboxes"))
    .orderBy("created_at", "desc")
    .orderBy("id", "desc")
    .limit(page.limit + 1);
  query =
    filter.statuses.length === 0
      ? query.where(sql<boolean>`status not in ('stopped', 'error')`)
      : query.where("status", "in", filter.statuses);
  if (Object.keys(filter.metadata).length > 0) {
    query = query.where(sql<boolean>`metadata @> ${JSON.stringify(filter.metadata)}::jsonb`);
  }
  const rows = await query.execute();
  return toPage(rows.map(toSummary), page.limit);
}

export interface SandboxChange extends Partial<Lifetime> {
  metadata?: Readonly<Record<string, string>> | undefined;
  expiresAt?: Date | null;
}

/** Changes what is no status; final rows are history. */
export async function changeSandbox(
  db: Queryable,
  teamId: TeamId,
  id: SandboxId,
  change: SandboxChange,
): Promise<SandboxRecord | undefined> {
  const row = await db
    .updateTable("sandboxes")
    .set({
      // So that there always is something to set.
      id,
      ...(change.timeoutSec !== undefined && { timeout_sec: change.timeoutSec }),
      ...(change.onTimeout && { on_timeout: change.onTimeout }),
      ...(change.timeoutMode && { timeout_mode: change.timeoutMode }),
      ...(change.metadata && { metadata: JSON.stringify(change.metadata) }),
      ...(change.expiresAt !== undefined && { expires_at: change.expiresAt }),
    })
    .where("id", "=", id)
    .where("team_id", "=", teamId)
    .where(sql<boolean>`status not in ('stopped', 'error')`)
    .returningAll()
    .executeTakeFirst();
  return row && toSandbox(row);
}

/**
 * Rows whose work should be done long since, claimed for this replica: the
 * generation is raised, so whoever was at it lost, and the new deadline is how
 * long we may take to settle it.
 */
export async function claimOverdueSandboxes(
  db: Queryable,
  options: { limit: number; leaseMs: number },
): Promise<SandboxSummaryRecord[]> {
  const rows = await db
    .updateTable("sandboxes")
    .set((eb) => ({
      generation: eb("generation", "+", 1n),
      operation_deadline: sql<Date>`now() + ${interval(options.leaseMs)}`,
    }))
    .where((eb) =>
      claimed(
        eb
          .selectFrom("sandboxes")
          .select("id")
          .where("operation_deadline", "<", sql<Date>`now()`)
          .orderBy("operation_deadline")
          .limit(options.limit)
          .forUpdate()
          .skipLocked(),
      ),
    )
    .returning(SUMMARY)
    .execute();
  return rows.map(toSummary);
}

/** Its host is still at work, or silent: the next look is later. False: it moved first. */
export async function extendDeadline(db: Queryable, at: At, deadlineMs: number): Promise<boolean> {
  const { numUpdatedRows } = await db
    .updateTable("sandboxes")
    .set({ operation_deadline: sql<Date>`now() + ${interval(deadlineMs)}` })
    .where("id", "=", at.id)
    .where("status", "=", at.status)
    .where("generation", "=", at.generation)
    .executeTakeFirst();
  return numUpdatedRows === 1n;
}

/** The host's share of the truth: what is not final there, by id. */
export async function liveSandboxesOfHost(
  db: Queryable,
  hostId: HostId,
  page: { after: string; limit: number },
): Promise<SandboxSummaryRecord[]> {
  const rows = await db
    .selectFrom("sandboxes")
    .select(SUMMARY)
    .where("host_id", "=", hostId)
    .where(sql<boolean>`status not in ('stopped', 'error')`)
    .where(sql<boolean>`id > ${page.after}`)
    .orderBy("id")
    .limit(page.limit)
    .execute();
  return rows.map(toSummary);
}

function toSandbox(row: Selectable<Sandboxes>): SandboxRecord {
  return { ...toSummary(row), env: row.env };
}

function toSummary(row: Pick<Selectable<Sandboxes>, (typeof SUMMARY)[number]>): SandboxSummaryRecord {
  return {
    id: row.id,
    teamId: row.team_id,
    status: row.status,
    generation: row.generation,
    commandGeneration: row.command_generation,
    template: row.template,
    snapshotId: row.snapshot_id ?? undefined,
    hostId: row.host_id ?? undefined,
    movingFrom: row.moving_from ?? undefined,
    vcpus: row.vcpus,
    memoryMb: row.memory_mb,
    diskMb: row.disk_mb,
    timeoutSec: row.timeout_sec,
    onTimeout: row.on_timeout,
    timeoutMode: row.timeout_mode,
    metadata: row.metadata,
    tokenVersion: row.token_version,
    createdAt: row.created_at,
    startedAt: row.started_at ?? undefined,
    expiresAt: row.expires_at ?? undefined,
    endedAt: row.ended_at ?? undefined,
    operationDeadline: row.operation_deadline ?? undefined,
    error:
      row.error_code === null || row.error_message === null
        ? undefined
        : { code: row.error_code, message: row.error_message },
    diskUsedBytes: row.disk_used_bytes === null ? undefined : Number(row.disk_used_bytes),
  };
}
