/**
 * What an operator does to a host: relabel, drain, revoke, delete.
 *
 * A deleted host's row stays as a tombstone: ended sandboxes name it, and its
 * agent, should it come back, is told by its old credentials that it was
 * deleted. So those are kept, and refused: no epoch of a deleted or revoked
 * host is ever good again.
 *
 * Each of these locks the host's row first, as whoever places a sandbox on it
 * does (sandboxes.ts): one comes wholly before the other.
 */
import { sql } from "kysely";
import type { HostId, SandboxId, SnapshotId, TeamId } from "../model/ids.ts";
import type { SandboxStatus } from "../model/sandbox.ts";
import type { Database, Queryable } from "./database.ts";
import { type HostEndpoint, type HostRecord, type HostScope, inScope, toEndpoint } from "./hosts.ts";
import { endMovesOfHost, loseSandboxesOfHost, stopSandboxesOfHost } from "./sandboxes-of-host.ts";

export interface HostChange {
  name?: string | undefined;
  /** Replaces all of them. */
  labels?: Readonly<Record<string, string>> | undefined;
  draining?: boolean | undefined;
}

/** False: no such host. Once it returns with `draining`, no sandbox comes to it any more. */
export async function changeHost(
  db: Queryable,
  scope: HostScope,
  id: HostId,
  { name, labels, draining }: HostChange,
): Promise<boolean> {
  const { numUpdatedRows } = await db
    .updateTable("hosts")
    .set({
      // So that there always is something to set.
      id,
      ...(name !== undefined && { name }),
      ...(labels && { labels: JSON.stringify(labels) }),
      ...(draining !== undefined && { draining }),
    })
    .where("id", "=", id)
    .where("deleted_at", "is", null)
    .where(inScope(scope))
    .executeTakeFirst();
  return numUpdatedRows === 1n;
}

/**
 * All its credentials are good no more, a registration token that nobody used
 * yet included, and its running sandboxes are `missing`, as those of a silent
 * host. Undefined: no such host.
 */
export async function revokeHost(
  db: Database,
  scope: HostScope,
  id: HostId,
): Promise<{ epoch: number; missing: number } | undefined> {
  return db.transaction().execute(async (tx) => {
    const host = await tx
      .updateTable("hosts")
      .set((eb) => ({
        epoch: eb("epoch", "+", 1),
        revoked_at: sql<Date>`now()`,
        status: sql<HostRecord["status"]>`case status when 'pending' then 'pending' else 'unreachable' end`,
      }))
      .where("id", "=", id)
      .where("deleted_at", "is", null)
      .where(inScope(scope))
      .returning("epoch")
      .executeTakeFirst();
    if (!host) return undefined;
    await tx.deleteFrom("host_registration_tokens").where("host_id", "=", id).execute();
    return { epoch: host.epoch, missing: await loseSandboxesOfHost(tx, id) };
  });
}

/** What ends with a host: the first of each kind, and how many there are. */
export interface HostContents {
  sandboxes: { id: SandboxId; teamId: TeamId; status: SandboxStatus }[];
  sandboxCount: number;
  /** Those that are on no other host. */
  snapshots: { id: SnapshotId; teamId: TeamId; name: string; sizeBytes: number }[];
  snapshotCount: number;
}

export async function contentsOfHost(db: Queryable, id: HostId, limit: number): Promise<HostContents> {
  const sandboxes = await db
    .selectFrom("sandboxes")
    .select(["id", "team_id", "status"])
    .select(sql<number>`(count(*) over ())::int`.as("count"))
    // Also what it keeps until it runs elsewhere.
    .where((eb) => eb.or([eb("host_id", "=", id), eb("moving_from", "=", id)]))
    .where(sql<boolean>`status not in ('stopped', 'error')`)
    .orderBy("id")
    .limit(limit)
    .execute();
  const snapshots = await db
    .selectFrom("snapshots")
    .select(["id", "team_id", "name", "size_bytes"])
    .select(sql<number>`(count(*) over ())::int`.as("count"))
    .where("host_id", "=", id)
    .where("status", "=", "ready")
    .where(isNowhereElse(id))
    .orderBy("id")
    .limit(limit)
    .execute();
  return {
    sandboxes: sandboxes.map((row) => ({ id: row.id, teamId: row.team_id, status: row.status })),
    sandboxCount: sandboxes[0]?.count ?? 0,
    snapshots: snapshots.map((row) => ({
      id: row.id,
      teamId: row.team_id,
      name: row.name,
      sizeBytes: Number(row.size_bytes),
    })),
    snapshotCount: snapshots[0]?.count ?? 0,
  };
}

/** In no object store, and on no other host. */
function isNowhereElse(hostId: HostId) {
  return sql<boolean>`snapshots.store_id is null and not exists (select from snapshot_copies
    where snapshot_id = snapshots.id and snapshot_copies.host_id <> ${hostId} and not deleting)`;
}

export type Deletion =
  | { kind: "unknown" }
  | { kind: "occupied"; contents: HostContents }
  | {
      kind: "deleted";
      /** Where it can still be told; absent: it never registered, or is not to be reached. */
      endpoint?: HostEndpoint;
      /** What it has to end, with the generations that its commands need. */
      stopped: { id: SandboxId; generation: bigint }[];
    };

/**
 * All or nothing: from its commit on, no live sandbox and no snapshot is on the
 * host, and none comes to it. Without `force` it does nothing when there are any.
 */
export async function deleteHost(
  db: Database,
  scope: HostScope,
  id: HostId,
  { force, limit }: { force: boolean; limit: number },
): Promise<Deletion> {
  return db.transaction().execute(async (tx): Promise<Deletion> => {
    const host = await tx
      .selectFrom("hosts")
      .select(["id", "address", "certificate_fingerprint", "epoch", "status"])
      .where("id", "=", id)
      .where("deleted_at", "is", null)
      .where(inScope(scope))
      .forUpdate()
      .executeTakeFirst();
    if (!host) return { kind: "unknown" };
    if (!force) {
      const contents = await contentsOfHost(tx, id, limit);
      if (contents.sandboxCount > 0 || contents.snapshotCount > 0) return { kind: "occupied", contents };
    }
    await endMovesOfHost(tx, id);
    const stopped = await stopSandboxesOfHost(tx, id);
    await tx.deleteFrom("snapshots").where("host_id", "=", id).where(isNowhereElse(id)).execute();
    await tx.deleteFrom("snapshot_copies").where("host_id", "=", id).execute();
    await tx.deleteFrom("host_registration_tokens").where("host_id", "=", id).execute();
    await tx
      .updateTable("hosts")
      .set((eb) => ({
        epoch: eb("epoch", "+", 1),
        deleted_at: sql<Date>`now()`,
        status: host.status === "pending" ? "pending" : "unreachable",
      }))
      .where("id", "=", id)
      .execute();
    const endpoint = host.status === "online" ? toEndpoint(host) : undefined;
    return { kind: "deleted", endpoint, stopped };
  });
}

export type HostEnd = "host_deleted" | "host_revoked";

/** Why nothing that the host has is good any more, if that is so. */
export async function endOfHost(db: Queryable, id: HostId): Promise<HostEnd | undefined> {
  const row = await db
    .selectFrom("hosts")
    .select(["deleted_at", "revoked_at"])
    .where("id", "=", id)
    .executeTakeFirst();
  return row && toHostEnd(row);
}

export function toHostEnd(row: { deleted_at: Date | null; revoked_at: Date | null }): HostEnd | undefined {
  if (row.deleted_at) return "host_deleted";
  return row.revoked_at ? "host_revoked" : undefined;
}

/** Of these hosts, the epochs that still count; one that is not in the answer is no host any more. */
export async function epochsOfHosts(db: Queryable, ids: readonly HostId[]): Promise<Map<HostId, number>> {
  if (ids.length === 0) return new Map();
  const rows = await db
    .selectFrom("hosts")
    .select(["id", "epoch"])
    .where(sql<boolean>`id = any(${ids})`)
    .where("deleted_at", "is", null)
    .execute();
  return new Map(rows.map(({ id, epoch }) => [id, epoch]));
}
