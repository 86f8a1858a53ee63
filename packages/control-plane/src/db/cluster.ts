/** The cluster's one row: who it is, its sealed secrets, and whether it could hear heartbeats. */
import { sql } from "kysely";
import type { Queryable } from "./database.ts";
import { interval } from "./interval.ts";

export interface ClusterRecord {
  id: string;
  sealedSecrets: Buffer;
}

/** The first caller's row stands; everyone gets that one. */
export async function openClusterRow(db: Queryable, candidate: ClusterRecord): Promise<ClusterRecord> {
  await db
    .insertInto("cluster")
    .values({ id: candidate.id, sealed_secrets: candidate.sealedSecrets })
    .onConflict((conflict) => conflict.column("singleton").doNothing())
    .execute();
  const row = await findCluster(db);
  if (!row) throw new Error("the cluster's row vanished");
  return row;
}

export async function findCluster(db: Queryable): Promise<ClusterRecord | undefined> {
  const row = await db.selectFrom("cluster").select(["id", "sealed_secrets"]).executeTakeFirst();
  return row && { id: row.id, sealedSecrets: row.sealed_secrets };
}

/** False: somebody sealed them anew in between. */
export async function replaceSealedSecrets(db: Queryable, from: Buffer, to: Buffer): Promise<boolean> {
  const { numUpdatedRows } = await db
    .updateTable("cluster")
    .set({ sealed_secrets: to })
    .where("sealed_secrets", "=", from)
    .executeTakeFirst();
  return numUpdatedRows === 1n;
}

/**
 * Says that this replica can receive heartbeats now; answers for how long the
 * cluster could without a gap longer than `maxGapMs`.
 */
export async function touchReceptive(db: Queryable, maxGapMs: number): Promise<number> {
  const row = await db
    .updateTable("cluster")
    .set({
      receptive_since: sql<Date>`case when receptive_at < now() - ${interval(maxGapMs)} then now() else receptive_since end`,
      receptive_at: sql<Date>`now()`,
    })
    .returning(sql<number>`extract(epoch from now() - receptive_since)::float8 * 1000`.as("receptive_ms"))
    .executeTakeFirstOrThrow();
  return row.receptive_ms;
}
