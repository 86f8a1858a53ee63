/**
 * Idempotency keys: a claim while the work is done, then its answer, for 24 h.
 *
 * A claim is a lease: whoever works renews it, and when its replica dies another
 * call takes over. The claim's text is a fencing token: an answer is stored only
 * by who still has the claim.
 */
import { sql } from "kysely";
import type { TeamId } from "../model/ids.ts";
import type { Queryable } from "./database.ts";
import { interval } from "./interval.ts";

export type Claimed =
  | { kind: "claimed" }
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
  const { rows } = await sql<{ claim: string }>`
    insert into idempotency_keys as held (team_id, key, fingerprint, claim, claimed_until, expires_at)
    values (${input.teamId}, ${input.key}, ${input.fingerprint}, ${input.claim},
            now() + ${interval(options.leaseMs)}, now() + ${interval(options.keepMs)})
    on conflict (team_id, key) do update
       set fingerprint = excluded.fingerprint, claim = excluded.claim, claimed_until = excluded.claimed_until,
           expires_at = excluded.expires_at, status = null, sealed_body = null
     where held.expires_at <= now()
        or (held.status is null and held.claimed_until <= now() and held.fingerprint = excluded.fingerprint)
    returning claim`.execute(db);
  if (rows.length > 0) return { kind: "claimed" };
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
  const { numUpdatedRows } = await db
    .updateTable("idempotency_keys")
    .set({ claimed_until: sql<Date>`now() + ${interval(leaseMs)}` })
    .where("team_id", "=", input.teamId)
    .where("key", "=", input.key)
    .where("claim", "=", input.claim)
    .where("status", "is", null)
    .executeTakeFirst();
  return numUpdatedRows === 1n;
}

export async function storeIdempotentAnswer(
  db: Queryable,
  input: IdempotencyClaim,
  answer: { status: number; sealedBody: Buffer },
): Promise<boolean> {
  const { numUpdatedRows } = await db
    .updateTable("idempotency_keys")
    .set({ status: answer.status, sealed_body: answer.sealedBody })
    .where("team_id", "=", input.teamId)
    .where("key", "=", input.key)
    .where("claim", "=", input.claim)
    .where("status", "is", null)
    .executeTakeFirst();
  return numUpdatedRows === 1n;
}

/** The work failed: the key is free again. */
export async function releaseIdempotencyClaim(db: Queryable, input: IdempotencyClaim): Promise<void> {
  await db
    .deleteFrom("idempotency_keys")
    .where("team_id", "=", input.teamId)
    .where("key", "=", input.key)
    .where("claim", "=", input.claim)
    .where("status", "is", null)
    .execute();
}

/** How many expired keys were dropped, of at most `limit`. */
export async function dropExpiredIdempotencyKeys(db: Queryable, limit: number): Promise<number> {
  const { rows } = await sql<{ key: string }>`
    delete from idempotency_keys where ctid = any(array(
      select ctid from idempotency_keys where expires_at <= now() order by expires_at limit ${limit}))
    returning key`.execute(db);
  return rows.length;
}
