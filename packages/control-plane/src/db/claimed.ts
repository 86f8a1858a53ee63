import { type Expression, type RawBuilder, sql } from "kysely";

/**
 * Rows of a locking subquery, which runs once: as a plain `in (…)` the planner
 * may run it again for each row, and lock more than its limit.
 */
export function claimed(query: Expression<{ id: string }>): RawBuilder<boolean> {
  return sql`id = any(array(${query}))`;
}
