/** Teams. */
import type { Selectable } from "kysely";
import type { TeamId } from "../model/ids.ts";
import type { Queryable } from "./database.ts";
import { type PageRequest, type Paged, olderThan, toPage } from "./page.ts";
import type { Teams } from "./schema.ts";

export interface TeamRecord {
  id: TeamId;
  name: string;
  createdAt: Date;
}

/** Undefined: the name is taken. */
export async function insertTeam(
  db: Queryable,
  input: { id: TeamId; name: string },
): Promise<TeamRecord | undefined> {
  const row = await db
    .insertInto("teams")
    .values(input)
    .onConflict((conflict) => conflict.column("name").doNothing())
    .returningAll()
    .executeTakeFirst();
  return row && toTeam(row);
}

export async function findTeamByName(db: Queryable, name: string): Promise<TeamRecord | undefined> {
  const row = await db.selectFrom("teams").selectAll().where("name", "=", name).executeTakeFirst();
  return row && toTeam(row);
}

export async function listTeams(db: Queryable, page: PageRequest): Promise<Paged<TeamRecord>> {
  const rows = await db
    .selectFrom("teams")
    .selectAll()
    .where(olderThan(page.cursor, "teams"))
    .orderBy("created_at", "desc")
    .orderBy("id", "desc")
    .limit(page.limit + 1)
    .execute();
  return toPage(rows.map(toTeam), page.limit);
}

/** How many of its sandboxes are not final, and how many may be. */
export async function teamQuota(
  db: Queryable,
  id: TeamId,
): Promise<{ live: number; max: number | undefined } | undefined> {
  const row = await db
    .selectFrom("teams")
    .select(["live_sandboxes", "max_sandboxes"])
    .where("id", "=", id)
    .executeTakeFirst();
  return row && { live: row.live_sandboxes, max: row.max_sandboxes ?? undefined };
}

function toTeam(row: Selectable<Teams>): TeamRecord {
  return { id: row.id, name: row.name, createdAt: row.created_at };
}
