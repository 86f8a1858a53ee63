/** How many of this database's connections wait for a row that another has locked. */
import { sql } from "kysely";
import type { Queryable } from "../database.ts";

export async function lockWaiters(db: Queryable): Promise<number> {
  const { rows } = await sql<{ count: number }>`select count(*)::int as count from pg_stat_activity
    where datname = current_database() and wait_event_type = 'Lock'`.execute(db);
  return rows[0]?.count ?? 0;
}
