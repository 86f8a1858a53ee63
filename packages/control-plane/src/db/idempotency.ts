/**
 * Idempotency keys: a claim while the work is done, then its answer, for 24 h.
 *
 * A claim is a lease: whoever works renews it, and when its replica dies another
 * call takes over. The claim's text is a fencing token: only who still has it
 * binds the key to what was made and stores the answer. Binding goes into the
 * transaction that writes the resource's row, so a key never makes two.
 */
import { sql } from "kysely";
import type { TeamId } from "../model/ids.ts";
import type { Queryable } from "./database.ts";
import { interval } from "./interval.ts";

export type Claimed =
  /** `resourceId`: what a call before made under this key, and did not live to answer. */
  | { kind: "claimed"; resourceId: string | undefined }
  | { kind: "busy"; fingerprint: string }
  | { kind: "answered"; fingerprint: string; status: number; sealedBody: Buffer };

export interface IdempotencyClaim {
  teamId: TeamId;
  key: string;
  fingerprint: string;
  claim: string;
}

export async function claimIdempotencyKey(
  db: Queryable,
  input: IdempotencyClaim,
  options: { leaseMs: number; keepMs: number },
): Promise<Claimed> {
  // Takes a free key, one that was forgotten, or one whose claim ran out for the same request.
  const { rows } = await sql<{ resource_id: string | null }>`
    insert into idempotency_keys as held (team_id, key, fingerprint, claim, claimed_until, expires_at)
    values (${input.teamId}, ${input.key}, ${input.fingerprint}, ${input.claim},
            now() + ${interval(options.leaseMs)}, now() + ${interval(options.keepMs)})
    on conflict (team_id, key) do update
       set fingerprint = excluded.fingerprint, claim = excluded.claim, claimed_until = excluded.claimed_until,
           expires_at = excluded.expires_at, status = null, sealed_body = null,
           resource_id = case when held.expires_at > now() then held.resource_id end
     where held.expires_at <= now()
        or (held.status is null and held.claimed_until <= now() and held.fingerprint = excluded.fingerprint)
    returning resource_id`.execute(db);
  if (rows[0]) return { kind: "claimed", resourceId: rows[0].resource_id ?? undefined };
  const row = await db
    .selectFrom("idempotency_keys")
    .select(["fingerprint", "status", "sealed_body"])
    .where("team_id", "=", input.teamId)
    .where("key", "=", input.key)
    .executeTakeFirst();
  // Given up in between: the next try gets it.
  if (!row) return { kind: "busy", fingerprint: input.fingerprint };
  const { fingerprint, status, sealed_body: sealedBody } = row;
  return status === null || sealedBody === null
    ? { kind: "busy", fingerprint }
    : { kind: "answered", fingerprint, status, sealedBody };
}

/** False: the claim was lost to another. */
export async function renewIdempotencyClaim(
  db: Queryable,
  input: IdempotencyClaim,
  leaseMs: number,
): Promise<boolean> {
  const { numUpdatedRows } = await heldKey(db, input)
    .set({ claimed_until: sql<Date>`now() + ${interval(leaseMs)}` })
    .executeTakeFirst();
  return numUpdatedRows === 1n;
}

/** Goes with the resource's row in one transaction. False: the claim was lost, and so must the row be. */
export async function bindIdempotencyKey(
  tx: Queryable,
  input: IdempotencyClaim,
  resourceId: string,
): Promise<boolean> {
  const { numUpdatedRows } = await heldKey(tx, input).set({ resource_id: resourceId }).executeTakeFirst();
  return numUpdatedRows === 1n;
}

/** False: the claim was lost to another. */
export async function storeIdempotentAnswer(
  db: Queryable,
  input: IdempotencyClaim,
  answer: { status: number; sealedBody: Buffer },
): Promise<boolean> {
  const { numUpdatedRows } = await heldKey(db, input)
    .set({ status: answer.status, sealed_body: answer.sealedBody })
    .executeTakeFirst();
  return numUpdatedRows === 1n;
}

/**
 * The work failed. The key is free again, unless what it made still lives (the
 * work was cut short, by an outage of this database for one): then whoever
 * comes next takes the claim over at once.
 */
export async function letGoOfIdempotencyKey(db: Queryable, input: IdempotencyClaim): Promise<void> {
  await sql`
    with freed as (
      delete from idempotency_keys as k
       where team_id = ${input.teamId} and key = ${input.key} and claim = ${input.claim} and status is null
         and not exists (select from sandboxes s where s.id = k.resource_id and s.status not in ('stopped', 'error'))
         and not exists (select from snapshots s where s.id = k.resource_id and s.status <> 'deleting')
      returning key
    )
    update idempotency_keys set claimed_until = now()
     where team_id = ${input.teamId} and key = ${input.key} and claim = ${input.claim} and status is null
       and not exists (select from freed)`.execute(db);
}

export interface SealedAnswer {
  teamId: TeamId;
  key: string;
  sealedBody: Buffer;
}

/** Stored answers in the order of their keys, after the one given. */
export async function sealedAnswers(
  db: Queryable,
  page: { after: { teamId: string; key: string }; limit: number },
): Promise<SealedAnswer[]> {
  const { rows } = await sql<SealedAnswer>`
    select team_id as "teamId", key, sealed_body as "sealedBody" from idempotency_keys
     where (team_id, key) > (${page.after.teamId}, ${page.after.key}) and sealed_body is not null
     order by team_id, key limit ${page.limit}`.execute(db);
  return rows;
}

/** False: the answer was replaced or dropped in between. */
export async function replaceSealedAnswer(
  db: Queryable,
  { teamId, key, sealedBody }: SealedAnswer,
  to: Buffer,
): Promise<boolean> {
  const { numUpdatedRows } = await db
    .updateTable("idempotency_keys")
    .set({ sealed_body: to })
    .where("team_id", "=", teamId)
    .where("key", "=", key)
    .where("sealed_body", "=", sealedBody)
    .executeTakeFirst();
  return numUpdatedRows === 1n;
}

/** How many expired keys were dropped, of at most `limit`. */
export async function dropExpiredIdempotencyKeys(db: Queryable, limit: number): Promise<number> {
  const { rows } = await sql<{ key: string }>`
    delete from idempotency_keys where ctid = any(array(
      select ctid from idempotency_keys where expires_at <= now() order by expires_at limit ${limit}))
    returning key`.execute(db);
  return rows.length;
}

/** The key's row, for as long as the claim is ours and unanswered. */
function heldKey(db: Queryable, { teamId, key, claim }: IdempotencyClaim) {
  return db
    .updateTable("idempotency_keys")
    .where("team_id", "=", teamId)
    .where("key", "=", key)
    .where("claim", "=", claim)
    .where("status", "is", null);
}
