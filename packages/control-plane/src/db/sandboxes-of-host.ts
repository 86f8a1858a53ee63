/** What becomes of all sandboxes of a host at once: it went silent, or it is deleted. */
import assert from "node:assert/strict";
import { sql } from "kysely";
import type { HostId, SandboxId } from "../model/ids.ts";
import { isFinal, nextStatus } from "../model/sandbox-state.ts";
import { SANDBOX_STATUSES } from "../model/sandbox.ts";
import type { Queryable } from "./database.ts";
import { HOST_SILENT } from "./sandboxes.ts";

/** The host went silent: all its running sandboxes are `missing`, until it returns. */
export async function loseSandboxesOfHost(db: Queryable, hostId: HostId): Promise<number> {
  assert.equal(nextStatus("running", "hostLost"), "missing");
  const { numUpdatedRows } = await db
    .updateTable("sandboxes")
    .set((eb) => ({
      status: "missing",
      status_reason: HOST_SILENT,
      generation: eb("generation", "+", 1n),
    }))
    .where("host_id", "=", hostId)
    .where("status", "=", "running")
    .executeTakeFirst();
  return Number(numUpdatedRows);
}

/**
 * The host is deleted: what other hosts keep until it runs here is paused there;
 * what it keeps for others is lost. Both before all the rest of the deletion.
 */
export async function endMovesOfHost(tx: Queryable, hostId: HostId): Promise<void> {
  for (const status of MOVING) assert.equal(nextStatus(status, "moveBack"), "paused");
  const moving = sql<boolean>`status in ('resuming', 'missing')`;
  // Their hosts are locked before they are, as everywhere.
  const { rows } = await sql<{ id: HostId }>`
    select id from hosts where deleted_at is null and id in (
      select moving_from from sandboxes where host_id = ${hostId} and moving_from is not null and ${moving}
    ) order by id for share`.execute(tx);
  if (rows.length > 0) {
    await tx
      .updateTable("sandboxes")
      .set((eb) => ({
        status: "paused",
        status_reason: "host_deleted",
        generation: eb("generation", "+", 1n),
        operation_deadline: null,
        host_id: sql<HostId>`moving_from`,
        moving_from: null,
      }))
      .where("host_id", "=", hostId)
      .where(
        "moving_from",
        "in",
        rows.map(({ id }) => id),
      )
      .where(moving)
      .execute();
  }
  await tx.updateTable("sandboxes").set({ moving_from: null }).where("moving_from", "=", hostId).execute();
}

const MOVING = ["resuming", "missing"] as const;

/**
 * The host is deleted: all that lives on it is `stopped`, whatever it was at.
 * Needs a transaction that holds the host's row. Those that were stopped.
 */
export async function stopSandboxesOfHost(
  tx: Queryable,
  hostId: HostId,
): Promise<{ id: SandboxId; generation: bigint }[]> {
  for (const status of SANDBOX_STATUSES)
    assert(isFinal(status) || status === "pending" || nextStatus(status, "hostDeleted") === "stopped");
  const stopped = await tx
    .updateTable("sandboxes")
    .set((eb) => ({
      status: "stopped",
      status_reason: "host_deleted",
      generation: eb("generation", "+", 1n),
      operation_deadline: null,
      expires_at: null,
      ended_at: sql<Date>`now()`,
      error_code: "host_error",
      error_message: "Its host was deleted.",
    }))
    .where("host_id", "=", hostId)
    .where(sql<boolean>`status not in ('stopped', 'error')`)
    .returning(["id", "team_id", "generation"])
    .execute();
  const byTeam = Map.groupBy(stopped, (row) => row.team_id);
  // In one order, so that two deletions don't wait for each other.
  for (const [teamId, rows] of [...byTeam].toSorted(([a], [b]) => (a < b ? -1 : 1))) {
    await tx
      .updateTable("teams")
      .set((eb) => ({ live_sandboxes: eb("live_sandboxes", "-", rows.length) }))
      .where("id", "=", teamId)
      .execute();
  }
  return stopped.map(({ id, generation }) => ({ id, generation }));
}
