/**
 * Which replica reads a host's event log, and how far it was read: columns of the
 * host's row. What the events do to sandboxes is in hosts/event-reader.ts.
 */
import { sql } from "kysely";
import type { HostId } from "../model/ids.ts";
import { claimed } from "./claimed.ts";
import type { Queryable } from "./database.ts";
import { type HostRecord, toHost } from "./hosts.ts";
import { interval } from "./interval.ts";

/**
 * Online hosts whose events no living replica reads are claimed; our own claims
 * are renewed when a third of their time has passed. All of ours are answered.
 *
 * With hundreds of hosts, a write to each at each look was most of what an idle
 * database did: a host that registers makes every replica look.
 */
export async function claimEventReading(
  db: Queryable,
  options: { reader: string; leaseMs: number; limit: number },
): Promise<HostRecord[]> {
  const { reader, leaseMs, limit } = options;
  const isFresh = sql<boolean>`event_reader_until > now() + ${interval((leaseMs * 2) / 3)}`;
  const rows = await db
    .with("taken", (query) =>
      query
        .updateTable("hosts")
        .set({ event_reader: reader, event_reader_until: sql<Date>`now() + ${interval(leaseMs)}` })
        .where((eb) =>
          claimed(
            eb
              .selectFrom("hosts")
              .select("id")
              .where("status", "=", "online")
              .where((eb) =>
                eb.or([
                  eb.and([eb("event_reader", "=", reader), eb.not(isFresh)]),
                  eb("event_reader_until", "is", null),
                  eb("event_reader_until", "<", sql<Date>`now()`),
                ]),
              )
              .orderBy(sql`event_reader is not distinct from ${reader}`, "desc")
              .limit(limit)
              .forUpdate()
              .skipLocked(),
          ),
        )
        .returningAll(),
    )
    .selectFrom("taken")
    .selectAll()
    .unionAll((eb) =>
      eb
        .selectFrom("hosts")
        .selectAll()
        .where("status", "=", "online")
        .where("event_reader", "=", reader)
        .where(isFresh),
    )
    .execute();
  return rows.map(toHost);
}

/** This replica ends: others may read at once. */
export async function releaseEventReading(db: Queryable, reader: string): Promise<void> {
  await db
    .updateTable("hosts")
    .set({ event_reader: null, event_reader_until: null })
    .where("event_reader", "=", reader)
    .execute();
}

/** The host's log is another than we knew: nothing of it was read. */
export async function adoptEventLog(db: Queryable, id: HostId, logId: string): Promise<void> {
  await db
    .updateTable("hosts")
    .set({ event_log_id: logId, acknowledged_event: 0n })
    .where("id", "=", id)
    .where(sql<boolean>`event_log_id is distinct from ${logId}`)
    .execute();
}

/** Goes with the event's effect in one transaction. */
export async function recordEventRead(
  tx: Queryable,
  id: HostId,
  logId: string,
  number: bigint,
): Promise<void> {
  await tx
    .updateTable("hosts")
    .set({ acknowledged_event: sql<bigint>`greatest(acknowledged_event, ${number})` })
    .where("id", "=", id)
    .where("event_log_id", "=", logId)
    .execute();
}
