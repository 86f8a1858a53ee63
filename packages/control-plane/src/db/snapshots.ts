/**
 * Snapshots: `creating` while a host makes one, `ready` when it may be used,
 * `deleting` until its hosts have forgotten it. Only `ready` ones have their name.
 */
import { type Selectable, sql } from "kysely";
import type { HostId, SnapshotId, TeamId } from "../model/ids.ts";
import type { Queryable } from "./database.ts";
import { type PageRequest, type Paged, olderThan, toPage } from "./page.ts";
import { claimed } from "./claimed.ts";
import { interval } from "./interval.ts";
import type { Snapshots } from "./schema.ts";

export interface SnapshotRecord {
  id: SnapshotId;
  teamId: TeamId;
  name: string;
  hostId: HostId;
  status: "creating" | "ready" | "deleting";
  vcpus: number;
  memoryMb: number;
  diskMb: number;
  sizeBytes: number;
  /** What a host must have to load it; absent: only its own may. */
  compat?: string;
  /** Object store that has all of it. */
  storeId?: string;
  createdAt: Date;
}

export const SNAPSHOT_NAME_CONSTRAINT = "snapshots_name";

/** False: its host is deleted. (Locked, so that it is not while this is being written.) */
export async function insertSnapshot(
  db: Queryable,
  input: Pick<SnapshotRecord, "id" | "teamId" | "name" | "hostId" | "vcpus" | "memoryMb" | "diskMb"> & {
    deadlineMs: number;
  },
): Promise<boolean> {
  const { numAffectedRows } = await sql`
    with host as (select id from hosts where id = ${input.hostId} and deleted_at is null for share),
    copy as (
      insert into snapshot_copies (snapshot_id, host_id) select ${input.id}, id from host
    )
    insert into snapshots (id, team_id, name, host_id, status, vcpus, memory_mb, disk_mb, operation_deadline)
    select ${input.id}, ${input.teamId}, ${input.name}, id, 'creating', ${input.vcpus}::int,
      ${input.memoryMb}::int, ${input.diskMb}::int, now() + ${interval(input.deadlineMs)}
      from host`.execute(db);
  return numAffectedRows === 1n;
}

/**
 * Makes it `ready` under its name, which the one that had it loses when it is
 * to be replaced. Needs a transaction; breaks SNAPSHOT_NAME_CONSTRAINT when the
 * name is taken. Undefined: it is not `creating` any more.
 */
export async function completeSnapshot(
  tx: Queryable,
  id: SnapshotId,
  made: { vcpus: number; memoryMb: number; diskMb: number; sizeBytes: number; compat?: string | undefined },
  options: { overwrite: boolean },
): Promise<SnapshotRecord | undefined> {
  if (options.overwrite) {
    await tx
      .updateTable("snapshots as old")
      .from("snapshots as new")
      .set({ status: "deleting", operation_deadline: sql<Date>`now()` })
      .where("new.id", "=", id)
      .where("new.status", "=", "creating")
      .whereRef("old.team_id", "=", "new.team_id")
      .whereRef("old.name", "=", "new.name")
      .where("old.status", "=", "ready")
      .execute();
  }
  const row = await tx
    .updateTable("snapshots")
    .set({
      status: "ready",
      operation_deadline: null,
      vcpus: made.vcpus,
      memory_mb: made.memoryMb,
      disk_mb: made.diskMb,
      size_bytes: BigInt(made.sizeBytes),
      compat: made.compat ?? null,
    })
    .where("id", "=", id)
    .where("status", "=", "creating")
    .returningAll()
    .executeTakeFirst();
  return row && toSnapshot(row);
}

export async function findSnapshot(
  db: Queryable,
  teamId: TeamId,
  nameOrId: string,
): Promise<SnapshotRecord | undefined> {
  const row = await db
    .selectFrom("snapshots")
    .selectAll()
    .where("team_id", "=", teamId)
    .where("status", "=", "ready")
    .where(sql<boolean>`(id = ${nameOrId} or name = ${nameOrId})`)
    // An id can't be a name: names are up to 63 characters of another alphabet, yet one may look like an id.
    .orderBy(sql`id = ${nameOrId}`, "desc")
    .executeTakeFirst();
  return row && toSnapshot(row);
}

export async function listSnapshots(
  db: Queryable,
  teamId: TeamId,
  page: PageRequest,
): Promise<Paged<SnapshotRecord>> {
  const rows = await db
    .selectFrom("snapshots")
    .selectAll()
    .where("team_id", "=", teamId)
    .where("status", "=", "ready")
    .where(olderThan(page.cursor, "snapshots"))
    .orderBy("created_at", "desc")
    .orderBy("id", "desc")
    .limit(page.limit + 1)
    .execute();
  return toPage(rows.map(toSnapshot), page.limit);
}

/** Somebody goes on with one that is `creating`; undefined when it is not, or not this team's. */
export async function extendSnapshotDeadline(
  db: Queryable,
  teamId: TeamId,
  id: SnapshotId,
  deadlineMs: number,
): Promise<SnapshotRecord | undefined> {
  const row = await db
    .updateTable("snapshots")
    .set({ operation_deadline: sql<Date>`now() + ${interval(deadlineMs)}` })
    .where("id", "=", id)
    .where("team_id", "=", teamId)
    .where("status", "=", "creating")
    .returningAll()
    .executeTakeFirst();
  return row && toSnapshot(row);
}

/** From here on nobody can use it. Compare-and-set: false when it is not `from` any more. */
export async function markSnapshotDeleting(
  db: Queryable,
  id: SnapshotId,
  deadlineMs: number,
  from: "creating" | "ready",
): Promise<boolean> {
  const { numUpdatedRows } = await db
    .updateTable("snapshots")
    .set({ status: "deleting", operation_deadline: sql<Date>`now() + ${interval(deadlineMs)}` })
    .where("id", "=", id)
    .where("status", "=", from)
    .executeTakeFirst();
  return numUpdatedRows === 1n;
}

/** Every host that could be reached has forgotten it. */
export async function removeSnapshot(db: Queryable, id: SnapshotId): Promise<void> {
  await db.deleteFrom("snapshots").where("id", "=", id).where("status", "=", "deleting").execute();
}

/** Unfinished ones whose replica died, and those whose deletion did not get through: all are to be deleted. */
export async function claimOverdueSnapshots(
  db: Queryable,
  options: { limit: number; leaseMs: number },
): Promise<SnapshotRecord[]> {
  const rows = await db
    .updateTable("snapshots")
    .set({ status: "deleting", operation_deadline: sql<Date>`now() + ${interval(options.leaseMs)}` })
    .where((eb) =>
      claimed(
        eb
          .selectFrom("snapshots")
          .select("id")
          .where("operation_deadline", "<", sql<Date>`now()`)
          .orderBy("operation_deadline")
          .limit(options.limit)
          .forUpdate()
          .skipLocked(),
      ),
    )
    .returningAll()
    .execute();
  return rows.map(toSnapshot);
}

export function toSnapshot(row: Selectable<Snapshots>): SnapshotRecord {
  return {
    id: row.id,
    teamId: row.team_id,
    name: row.name,
    hostId: row.host_id,
    status: row.status,
    vcpus: row.vcpus,
    memoryMb: row.memory_mb,
    diskMb: row.disk_mb,
    sizeBytes: Number(row.size_bytes),
    compat: row.compat ?? undefined,
    storeId: row.store_id ?? undefined,
    createdAt: row.created_at,
  };
}
