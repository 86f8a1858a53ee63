/** What a host has and no row knows, as its last comparison found it. */
import { sql } from "kysely";
import type { HostId } from "../model/ids.ts";
import type { Queryable } from "./database.ts";

export interface Strangers {
  count: number;
  /** There were so many that none was touched. */
  untouched: boolean;
}

export async function recordStrangers(
  db: Queryable,
  id: HostId,
  { count, untouched }: Strangers,
): Promise<void> {
  await db
    .updateTable("hosts")
    .set({ strangers: count, strangers_untouched: untouched })
    .where("id", "=", id)
    .execute();
}

/** Over all hosts that there are. */
export async function countStrangers(
  db: Queryable,
): Promise<{ sandboxes: number; hosts: number; untouchedHosts: number }> {
  return await db
    .selectFrom("hosts")
    .select([
      sql<number>`coalesce(sum(strangers), 0)::int`.as("sandboxes"),
      sql<number>`count(*)::int`.as("hosts"),
      sql<number>`(count(*) filter (where strangers_untouched))::int`.as("untouchedHosts"),
    ])
    .where("strangers", ">", 0)
    .where("deleted_at", "is", null)
    .executeTakeFirstOrThrow();
}
