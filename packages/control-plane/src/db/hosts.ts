/**
 * Hosts: who they are, what they last said, and which replica checks them.
 *
 * Liveness is `pending → online ⇄ unreachable`; draining is a mark beside it,
 * so that a draining host that was silent for a while still drains. A deleted
 * host's row stays, and nothing here finds it. How hosts drain and end is in
 * host-end.ts; who reads their events, in host-event-reading.ts.
 */
import { type Expression, type Selectable, type SqlBool, sql } from "kysely";
import type { HostId, TeamId } from "../model/ids.ts";
import type { Queryable } from "./database.ts";
import { type PageRequest, type Paged, olderThan, toPage } from "./page.ts";
import { claimed } from "./claimed.ts";
import { interval } from "./interval.ts";
import type { Hosts } from "./schema.ts";

export interface HostLoad {
  cpus: number;
  memoryMbUsed: number;
  diskMbFree: number;
  sandboxes: number;
}

/** What is needed to talk to it. */
export interface HostEndpoint {
  id: HostId;
  address: string;
  /** Absent: plain HTTP, on loopback only. */
  certificateFingerprint?: string;
  /** Of its registration: a host that registers anew may be another machine. */
  epoch: number;
}

export interface HostRecord {
  id: HostId;
  name: string;
  type: "shared" | "byoc";
  teamId?: TeamId;
  status: "pending" | "online" | "unreachable";
  draining: boolean;
  labels: Readonly<Record<string, string>>;
  address?: string;
  certificateFingerprint?: string;
  arch?: string;
  cpus?: number;
  memoryMb?: number;
  diskMb?: number;
  drivers?: Readonly<Record<string, string>>;
  version?: string;
  load?: HostLoad;
  epoch: number;
  /** Sandboxes on it that no row knows, as last seen; and whether they were too many to touch any. */
  strangers: number;
  strangersUntouched: boolean;
  /** Memory of which other hosts it can load. */
  snapshotCompat?: string;
  /** Object store that it uses. */
  storeId?: string;
  eventLogId?: string;
  acknowledgedEvent: bigint;
  lastHeartbeatAt?: Date;
  /** Its credentials are good no more, until it registers again. */
  revokedAt?: Date;
  createdAt: Date;
}

export type HostWithCount = HostRecord & { sandboxes: number };

/** Whose hosts a caller may see: a team's own, or all. */
export type HostScope = { teamId: TeamId } | "all";

export interface HostFacts {
  address: string;
  certificateFingerprint?: string | undefined;
  publicKey: string;
  arch: string;
  cpus: number;
  memoryMb: number;
  diskMb: number;
  drivers: Readonly<Record<string, string>>;
  version: string;
}

export async function insertHost(
  db: Queryable,
  input: {
    id: HostId;
    name: string;
    type: "shared" | "byoc";
    teamId?: TeamId | undefined;
    labels: Readonly<Record<string, string>>;
  },
): Promise<void> {
  await db
    .with("host", (query) =>
      query
        .insertInto("hosts")
        .values({
          id: input.id,
          name: input.name,
          type: input.type,
          team_id: input.teamId ?? null,
          labels: JSON.stringify(input.labels),
        })
        .returning("id"),
    )
    // Here, so that no change of a sandbox has to lock its host for it (db/sandboxes.ts).
    .insertInto("host_sandbox_digests")
    .columns(["host_id", "digest"])
    .expression((eb) => eb.selectFrom("host").select(["id", sql<bigint>`0::bigint`.as("digest")]))
    .execute();
}

export async function findHost(
  db: Queryable,
  scope: HostScope,
  id: HostId,
): Promise<HostWithCount | undefined> {
  const row = await db
    .selectFrom("hosts")
    .selectAll()
    .select(liveSandboxes)
    .where("id", "=", id)
    .where("deleted_at", "is", null)
    .where(inScope(scope))
    .executeTakeFirst();
  return row && { ...toHost(row), sandboxes: row.sandboxes };
}

export async function listHosts(
  db: Queryable,
  scope: HostScope,
  page: PageRequest,
): Promise<Paged<HostWithCount>> {
  const rows = await db
    .selectFrom("hosts")
    .selectAll()
    .select(liveSandboxes)
    .where("deleted_at", "is", null)
    .where(inScope(scope))
    .where(olderThan(page.cursor, "hosts"))
    .orderBy("created_at", "desc")
    .orderBy("id", "desc")
    .limit(page.limit + 1)
    .execute();
  return toPage(
    rows.map((row) => ({ ...toHost(row), sandboxes: row.sandboxes })),
    page.limit,
  );
}

/** Those that may take a sandbox of this team, by age. */
export async function schedulableHosts(db: Queryable, teamId: TeamId): Promise<HostRecord[]> {
  const rows = await db
    .selectFrom("hosts")
    .selectAll()
    .where("status", "=", "online")
    .where("draining", "=", false)
    .where((eb) => eb.or([eb("team_id", "is", null), eb("team_id", "=", teamId)]))
    .orderBy("id")
    .execute();
  return rows.map(toHost);
}

type HostPresence = Pick<HostRecord, "status" | "draining" | "snapshotCompat" | "storeId">;

/** Undefined: not here, deleted, or never registered. */
export async function findHostEndpoint(
  db: Queryable,
  id: HostId,
): Promise<(HostEndpoint & HostPresence) | undefined> {
  const row = await db
    .selectFrom("hosts")
    .select(["id", "address", "certificate_fingerprint", "epoch", "status", "draining"])
    .select(["snapshot_compat", "store_id"])
    .where("id", "=", id)
    .where("deleted_at", "is", null)
    .executeTakeFirst();
  const endpoint = row && toEndpoint(row);
  if (!endpoint) return undefined;
  const { status, draining, snapshot_compat: compat, store_id: storeId } = row;
  return {
    ...endpoint,
    status,
    draining,
    snapshotCompat: compat ?? undefined,
    storeId: storeId ?? undefined,
  };
}

export function toEndpoint(
  row: Pick<Selectable<Hosts>, "id" | "address" | "certificate_fingerprint" | "epoch">,
): HostEndpoint | undefined {
  const { id, address, certificate_fingerprint: fingerprint, epoch } = row;
  return address === null
    ? undefined
    : { id, address, certificateFingerprint: fingerprint ?? undefined, epoch };
}

/**
 * It registered: new facts, and an epoch that older access tokens don't have.
 * Its first heartbeat puts it online: until it has our answer it knows no key
 * of ours, and would refuse every command. Undefined: no such host.
 */
export async function recordRegistration(
  tx: Queryable,
  id: HostId,
  facts: HostFacts,
): Promise<{ epoch: number } | undefined> {
  return tx
    .updateTable("hosts")
    .set((eb) => ({
      status: "unreachable",
      address: facts.address,
      certificate_fingerprint: facts.certificateFingerprint ?? null,
      public_key: facts.publicKey,
      arch: facts.arch,
      cpus: facts.cpus,
      memory_mb: facts.memoryMb,
      disk_mb: facts.diskMb,
      drivers: JSON.stringify(facts.drivers),
      version: facts.version,
      epoch: eb("epoch", "+", 1),
      revoked_at: null,
      compared_at: null,
      last_heartbeat_at: sql<Date>`now()`,
      next_check_at: sql<Date>`now()`,
    }))
    .where("id", "=", id)
    .where("deleted_at", "is", null)
    .returning("epoch")
    .executeTakeFirst();
}

/** Cuts off every access token that it has. */
export async function raiseHostEpoch(tx: Queryable, id: HostId): Promise<void> {
  await tx
    .updateTable("hosts")
    .set((eb) => ({ epoch: eb("epoch", "+", 1) }))
    .where("id", "=", id)
    .execute();
}

/** What an access token proves. */
export interface HostProof {
  epoch: number;
  /** Of the refresh token that came with it; absent in tokens of older releases. */
  refreshHash?: Buffer | undefined;
}

export interface Heartbeat {
  load: HostLoad;
  digest: string;
  eventLogId: string;
  /** Absent: an agent that shares no snapshots. */
  snapshots?: { compat: string; storeId?: string | undefined } | undefined;
}

/**
 * It lives, and the tokens that it shows are in use. Whether its digest is the
 * one that our rows have is seen here, while both are of the same moment. One
 * that was silent is looked at at once, and whole; another event log begins at
 * its beginning. Undefined: no such host, or the token is of another epoch.
 */
export async function recordHeartbeat(
  db: Queryable,
  id: HostId,
  { epoch, refreshHash }: HostProof,
  heartbeat: Heartbeat,
): Promise<{ acknowledgedEvent: bigint; wasSilent: boolean } | undefined> {
  const row = await db
    .with("before", (query) =>
      query
        .selectFrom("hosts")
        .select(["id", "status"])
        .where("id", "=", id)
        .where("epoch", "=", epoch)
        .where("deleted_at", "is", null)
        .forUpdate(),
    )
    .with("used", (query) =>
      query
        .updateTable("host_refresh_tokens")
        .from("before")
        .set({ used_at: sql<Date>`now()` })
        .where("token_hash", "=", refreshHash ?? null)
        .whereRef("host_id", "=", "before.id")
        .where("used_at", "is", null),
    )
    .updateTable("hosts")
    .from("before")
    .set({
      status: "online",
      last_heartbeat_at: sql<Date>`now()`,
      load: JSON.stringify(heartbeat.load),
      digest: heartbeat.digest,
      digest_differs: sql<boolean>`${heartbeat.digest} <> ${digestOfHost(id)}`,
      compared_at: sql<Date | null>`case when before.status = 'online' then hosts.compared_at end`,
      snapshot_compat: heartbeat.snapshots?.compat ?? null,
      store_id: heartbeat.snapshots?.storeId ?? null,
      next_check_at: sql<Date>`case when before.status = 'online' then hosts.next_check_at else now() end`,
      acknowledged_event: sql<bigint>`case when hosts.event_log_id = ${heartbeat.eventLogId} then hosts.acknowledged_event else 0 end`,
      event_log_id: heartbeat.eventLogId,
    })
    .whereRef("hosts.id", "=", "before.id")
    .where("hosts.status", "!=", "pending")
    .returning(["hosts.acknowledged_event", "before.status as before_status"])
    .executeTakeFirst();
  return row && { acknowledgedEvent: row.acknowledged_event, wasSilent: row.before_status === "unreachable" };
}

/**
 * Compare-and-set: only if it still is silent for that long, by the database's
 * clock. True also for one that is `unreachable` already.
 */
export async function markHostUnreachable(db: Queryable, id: HostId, silentMs: number): Promise<boolean> {
  const { numUpdatedRows } = await db
    .updateTable("hosts")
    .set({ status: "unreachable" })
    .where("id", "=", id)
    .where("status", "!=", "pending")
    .where("deleted_at", "is", null)
    .where("last_heartbeat_at", "<", sql<Date>`now() - ${interval(silentMs)}`)
    .executeTakeFirst();
  return numUpdatedRows === 1n;
}

/** As packages/protocol/src/sandbox-digest.ts writes it. Kept by triggers: see migration 3. */
const digestOfHost = (id: HostId) => sql<string>`(
  select 'x1:' || lpad(to_hex(coalesce(max(digest), 0)), 16, '0')
    from host_sandbox_digests where host_id = ${id})`;

/** Why a host's sandboxes are to be held against our rows, one by one. */
export const COMPARE_REASONS = ["differs", "unheard", "due"] as const;
export type CompareReason = (typeof COMPARE_REASONS)[number];

export interface DueHost extends HostRecord {
  silentMs: number;
  /** Absent: its last heartbeat said what our rows say, and that was not long ago. */
  compare?: CompareReason;
}

/** Hosts whose check is due, claimed by moving their next one: one replica at a time looks at each. */
export async function claimDueHosts(
  db: Queryable,
  options: { limit: number; everyMs: number; unheardMs: number; compareEveryMs: number },
): Promise<DueHost[]> {
  const rows = await db
    .updateTable("hosts")
    .set({ next_check_at: sql<Date>`now() + ${interval(options.everyMs)}` })
    .where((eb) =>
      claimed(
        eb
          .selectFrom("hosts")
          .select("id")
          .where("status", "!=", "pending")
          .where("deleted_at", "is", null)
          .where("next_check_at", "<=", sql<Date>`now()`)
          .orderBy("next_check_at")
          .limit(options.limit)
          .forUpdate()
          .skipLocked(),
      ),
    )
    .returningAll()
    .returning(sql<number>`extract(epoch from now() - last_heartbeat_at)::float8 * 1000`.as("silent_ms"))
    .returning(
      sql<CompareReason | null>`case when digest_differs then 'differs'
        when last_heartbeat_at < now() - ${interval(options.unheardMs)} then 'unheard'
        when compared_at is null or compared_at < now() - ${interval(options.compareEveryMs)} then 'due'
        end`.as("compare"),
    )
    .execute();
  return rows.map((row) => ({
    ...toHost(row),
    silentMs: row.silent_ms,
    compare: row.compare ?? undefined,
  }));
}

/** All that it has was held against our rows. */
export async function recordComparison(db: Queryable, id: HostId): Promise<void> {
  await db
    .updateTable("hosts")
    .set({ compared_at: sql<Date>`now()` })
    .where("id", "=", id)
    .execute();
}

const liveSandboxes = sql<number>`(select count(*)::int from sandboxes
  where sandboxes.host_id = hosts.id and sandboxes.status not in ('stopped', 'error'))`.as("sandboxes");

export function inScope(scope: HostScope): Expression<SqlBool> {
  return scope === "all" ? sql<boolean>`true` : sql<boolean>`hosts.team_id = ${scope.teamId}`;
}

export function toHost(row: Selectable<Hosts>): HostRecord {
  return {
    id: row.id,
    name: row.name,
    type: row.type,
    teamId: row.team_id ?? undefined,
    status: row.status,
    draining: row.draining,
    labels: row.labels,
    address: row.address ?? undefined,
    certificateFingerprint: row.certificate_fingerprint ?? undefined,
    arch: row.arch ?? undefined,
    cpus: row.cpus ?? undefined,
    memoryMb: row.memory_mb ?? undefined,
    diskMb: row.disk_mb ?? undefined,
    drivers: row.drivers ?? undefined,
    version: row.version ?? undefined,
    load: row.load ?? undefined,
    snapshotCompat: row.snapshot_compat ?? undefined,
    storeId: row.store_id ?? undefined,
    epoch: row.epoch,
    strangers: row.strangers,
    strangersUntouched: row.strangers_untouched,
    eventLogId: row.event_log_id ?? undefined,
    acknowledgedEvent: row.acknowledged_event,
    lastHeartbeatAt: row.last_heartbeat_at ?? undefined,
    revokedAt: row.revoked_at ?? undefined,
    createdAt: row.created_at,
  };
}
