/** API keys: only their hashes are here. */
import { type Selectable, sql } from "kysely";
import type { ApiKeyId, TeamId } from "../model/ids.ts";
import type { Queryable } from "./database.ts";
import { type PageRequest, type Paged, olderThan, toPage } from "./page.ts";
import type { ApiKeys } from "./schema.ts";

export interface ApiKeyRecord {
  id: ApiKeyId;
  teamId: TeamId;
  name: string;
  role: "member" | "platform";
  prefix: string;
  createdAt: Date;
  lastUsedAt?: Date;
}

export async function insertApiKey(
  db: Queryable,
  input: Pick<ApiKeyRecord, "id" | "teamId" | "name" | "role" | "prefix"> & { keyHash: Buffer },
): Promise<ApiKeyRecord> {
  const row = await db
    .insertInto("api_keys")
    .values({
      id: input.id,
      team_id: input.teamId,
      name: input.name,
      role: input.role,
      prefix: input.prefix,
      key_hash: input.keyHash,
    })
    .returningAll()
    .executeTakeFirstOrThrow();
  return toApiKey(row);
}

export async function findApiKey(db: Queryable, keyHash: Buffer): Promise<ApiKeyRecord | undefined> {
  const row = await db.selectFrom("api_keys").selectAll().where("key_hash", "=", keyHash).executeTakeFirst();
  return row && toApiKey(row);
}

/** Notes that it was used, at most once per `everyMs` whichever replicas see it. */
export async function touchApiKey(db: Queryable, id: ApiKeyId, everyMs: number): Promise<void> {
  await db
    .updateTable("api_keys")
    .set({ last_used_at: sql<Date>`now()` })
    .where("id", "=", id)
    .where(
      sql<boolean>`(last_used_at is null or last_used_at < now() - make_interval(secs => ${everyMs / 1000}))`,
    )
    .execute();
}

export async function listApiKeys(
  db: Queryable,
  teamId: TeamId,
  page: PageRequest,
): Promise<Paged<ApiKeyRecord>> {
  const rows = await db
    .selectFrom("api_keys")
    .selectAll()
    .where("team_id", "=", teamId)
    .where(olderThan(page.cursor, "api_keys"))
    .orderBy("created_at", "desc")
    .orderBy("id", "desc")
    .limit(page.limit + 1)
    .execute();
  return toPage(rows.map(toApiKey), page.limit);
}

/** False: the team has no such key. */
export async function deleteApiKey(db: Queryable, teamId: TeamId, id: ApiKeyId): Promise<boolean> {
  const { numDeletedRows } = await db
    .deleteFrom("api_keys")
    .where("id", "=", id)
    .where("team_id", "=", teamId)
    .executeTakeFirst();
  return numDeletedRows === 1n;
}

function toApiKey(row: Selectable<ApiKeys>): ApiKeyRecord {
  return {
    id: row.id,
    teamId: row.team_id,
    name: row.name,
    role: row.role,
    prefix: row.prefix,
    createdAt: row.created_at,
    lastUsedAt: row.last_used_at ?? undefined,
  };
}
