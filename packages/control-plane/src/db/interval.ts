import { type RawBuilder, sql } from "kysely";

/** A span of time for the database's clock, which is the one that replicas share. */
export function interval(ms: number): RawBuilder<string> {
  return sql`make_interval(secs => ${ms / 1000})`;
}
