/** Platform templates; and with a team's snapshots, all that it can make sandboxes from. */
import { sql } from "kysely";
import type { SnapshotId, TeamId, TemplateId } from "../model/ids.ts";
import type { Queryable } from "./database.ts";
import { type PageRequest, type Paged, olderThan, toPage } from "./page.ts";

export interface TemplateRecord {
  id: TemplateId | SnapshotId;
  name: string;
  kind: "platform" | "snapshot";
  vcpus: number;
  memoryMb: number;
  diskMb: number;
  createdAt: Date;
}

export async function findPlatformTemplate(
  db: Queryable,
  nameOrId: string,
): Promise<TemplateRecord | undefined> {
  const row = await db
    .selectFrom("templates")
    .selectAll()
    .where(sql<boolean>`(id = ${nameOrId} or name = ${nameOrId})`)
    .executeTakeFirst();
  return row && toTemplate({ ...row, kind: "platform" });
}

export async function listTemplates(
  db: Queryable,
  teamId: TeamId,
  page: PageRequest,
): Promise<Paged<TemplateRecord>> {
  const rows = await db
    .selectFrom((query) =>
      query
        .selectFrom("templates")
        .select(["name", "vcpus", "memory_mb", "disk_mb", "created_at"])
        .select((eb) => eb.ref("id").$castTo<TemplateId | SnapshotId>().as("id"))
        .select(sql<"platform" | "snapshot">`'platform'`.as("kind"))
        .unionAll(
          query
            .selectFrom("snapshots")
            .select(["name", "vcpus", "memory_mb", "disk_mb", "created_at"])
            .select((eb) => eb.ref("id").$castTo<TemplateId | SnapshotId>().as("id"))
            .select(sql<"platform" | "snapshot">`'snapshot'`.as("kind"))
            .where("team_id", "=", teamId)
            .where("status", "=", "ready"),
        )
        .as("all"),
    )
    .selectAll()
    .where(olderThan(page.cursor, "all"))
    .orderBy("created_at", "desc")
    .orderBy("id", "desc")
    .limit(page.limit + 1)
    .execute();
  return toPage(rows.map(toTemplate), page.limit);
}

function toTemplate(row: {
  id: TemplateId | SnapshotId;
  name: string;
  kind: "platform" | "snapshot";
  vcpus: number;
  memory_mb: number;
  disk_mb: number;
  created_at: Date;
}): TemplateRecord {
  return {
    id: row.id,
    name: row.name,
    kind: row.kind,
    vcpus: row.vcpus,
    memoryMb: row.memory_mb,
    diskMb: row.disk_mb,
    createdAt: row.created_at,
  };
}
