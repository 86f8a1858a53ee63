/**
 * On which hosts snapshots lie, or may lie, and which of them are still to be
 * told that one is deleted. See 0006_shared_snapshots.sql.
 */
import { sql } from "kysely";
import type { HostId, SnapshotId } from "../model/ids.ts";
import type { Queryable } from "./database.ts";
import { type HostEndpoint, toEndpoint } from "./hosts.ts";

/**
 * A host is about to fetch it. False: it may not be used any more. (Locked, so
 * that a deletion sees either this copy or nobody who fetches.)
 */
export async function recordSnapshotCopy(
  db: Queryable,
  id: SnapshotId,
  hostId: HostId,
  /** `creating`: one that only carries a sandbox to this host. */
  status: "ready" | "creating" = "ready",
): Promise<boolean> {
  const { rows } = await sql`
    with snapshot as (select id from snapshots where id = ${id} and status = ${status} for share),
    copy as (
      insert into snapshot_copies (snapshot_id, host_id) select id, ${hostId} from snapshot
      on conflict (snapshot_id, host_id) do nothing
    )
    select id from snapshot`.execute(db);
  return rows.length === 1;
}

/** Hosts that have it, as far as anybody knows. */
export async function hostsOfSnapshot(db: Queryable, id: SnapshotId): Promise<HostId[]> {
  const rows = await db
    .selectFrom("snapshot_copies")
    .select("host_id")
    .where("snapshot_id", "=", id)
    .where("deleting", "=", false)
    .execute();
  return rows.map((row) => row.host_id);
}

/**
 * Every copy is to go, and the store's: some host that uses that store is to be
 * told too, if none that is online has a copy. Gives back the online ones.
 */
export async function condemnSnapshotCopies(db: Queryable, id: SnapshotId): Promise<HostEndpoint[]> {
  await sql`
    with condemned as (
      update snapshot_copies set deleting = true where snapshot_id = ${id} returning host_id
    )
    insert into snapshot_copies (snapshot_id, host_id, deleting)
    select snapshots.id, hosts.id, true from snapshots
      join hosts on hosts.store_id = snapshots.store_id and hosts.deleted_at is null
     where snapshots.id = ${id}
       and not exists (
         select from condemned join hosts as other on other.id = condemned.host_id
          where other.store_id = snapshots.store_id and other.status = 'online' and other.deleted_at is null
       )
     order by hosts.status = 'online' desc, hosts.id limit 1
    on conflict (snapshot_id, host_id) do update set deleting = true`.execute(db);
  const rows = await db
    .selectFrom("snapshot_copies")
    .innerJoin("hosts", "hosts.id", "snapshot_copies.host_id")
    .select(["hosts.id", "address", "certificate_fingerprint", "epoch"])
    .where("snapshot_id", "=", id)
    .where("hosts.status", "=", "online")
    .where("deleted_at", "is", null)
    .execute();
  return rows.flatMap((row) => toEndpoint(row) ?? []);
}

/** Its host has forgotten it. */
export async function removeSnapshotCopy(db: Queryable, id: SnapshotId, hostId: HostId): Promise<void> {
  await db
    .deleteFrom("snapshot_copies")
    .where("snapshot_id", "=", id)
    .where("host_id", "=", hostId)
    .where("deleting", "=", true)
    .execute();
}

/** What this host is still to be told to forget. */
export async function condemnedCopiesOfHost(
  db: Queryable,
  hostId: HostId,
  limit: number,
): Promise<SnapshotId[]> {
  const rows = await db
    .selectFrom("snapshot_copies")
    .select("snapshot_id")
    .where("host_id", "=", hostId)
    .where("deleting", "=", true)
    .orderBy("snapshot_id")
    .limit(limit)
    .execute();
  return rows.map((row) => row.snapshot_id);
}

/** Made on this host, and in no store as far as we know. */
export async function unsentSnapshotsOfHost(
  db: Queryable,
  hostId: HostId,
  limit: number,
): Promise<SnapshotId[]> {
  const rows = await db
    .selectFrom("snapshots")
    .select("id")
    .where("host_id", "=", hostId)
    .where("store_id", "is", null)
    .where("status", "=", "ready")
    // In turns: many that are never sent must not hide one that was.
    .orderBy(sql`random()`)
    .limit(limit)
    .execute();
  return rows.map((row) => row.id);
}

export async function recordSnapshotStored(db: Queryable, id: SnapshotId, storeId: string): Promise<void> {
  await db.updateTable("snapshots").set({ store_id: storeId }).where("id", "=", id).execute();
}
