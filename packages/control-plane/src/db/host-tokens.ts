/**
 * Tokens of hosts: one-time registration tokens and rotating refresh tokens. A
 * refresh token is used when it is shown, or the access token that came with it.
 * Only hashes are here. Which of them is good is decided in hosts/credentials.ts;
 * these functions run inside its transactions.
 */
import { sql } from "kysely";
import type { HostId } from "../model/ids.ts";
import type { Queryable } from "./database.ts";
import { type HostEnd, toHostEnd } from "./host-end.ts";
import { interval } from "./interval.ts";

/** Replaces the one that the host had. */
export async function putRegistrationToken(
  db: Queryable,
  hostId: HostId,
  tokenHash: Buffer,
  validMs: number,
): Promise<Date> {
  const expires_at = sql<Date>`now() + ${interval(validMs)}`;
  const row = await db
    .insertInto("host_registration_tokens")
    .values({ host_id: hostId, token_hash: tokenHash, expires_at })
    .onConflict((conflict) =>
      conflict.column("host_id").doUpdateSet({ token_hash: tokenHash, expires_at, spent_at: null }),
    )
    .returning("expires_at")
    .executeTakeFirstOrThrow();
  return row.expires_at;
}

/** Its host, once; undefined when it is unknown, spent or too old. */
export async function spendRegistrationToken(tx: Queryable, tokenHash: Buffer): Promise<HostId | undefined> {
  const row = await tx
    .updateTable("host_registration_tokens")
    .set({ spent_at: sql<Date>`now()` })
    .where("token_hash", "=", tokenHash)
    .where("spent_at", "is", null)
    .where("expires_at", ">", sql<Date>`now()`)
    .returning("host_id")
    .executeTakeFirst();
  return row?.host_id;
}

/**
 * The host that was registered by a spent token with this key, as long as
 * nothing of what it was given then has been used. Its row is locked.
 */
export async function findUnheardRegistration(
  tx: Queryable,
  tokenHash: Buffer,
  publicKey: string,
): Promise<HostId | undefined> {
  const spent = await tx
    .selectFrom("host_registration_tokens")
    .select("host_id")
    .where("token_hash", "=", tokenHash)
    .where("spent_at", "is not", null)
    .executeTakeFirst();
  if (!spent) return undefined;
  const host = await tx
    .selectFrom("hosts")
    .select("id")
    .where("id", "=", spent.host_id)
    .where("public_key", "=", publicKey)
    .where("deleted_at", "is", null)
    .where("revoked_at", "is", null)
    .forUpdate()
    .executeTakeFirst();
  if (!host) return undefined;
  // Asked once the row is ours: a heartbeat or a refresh may have been first.
  const unheard = await tx
    .selectFrom("host_refresh_tokens")
    .select("host_id")
    .where("host_id", "=", host.id)
    .where("parent_hash", "is", null)
    .where("used_at", "is", null)
    .executeTakeFirst();
  return unheard?.host_id;
}

export interface RefreshToken {
  hash: Buffer;
  hostId: HostId;
  isExpired: boolean;
  /** One that it was exchanged for, or another that was given for its parent, was used. */
  isOutrun: boolean;
  epoch: number;
  /** Its host was deleted or revoked: it is good no more, and kept to say so. */
  hostEnd: HostEnd | undefined;
}

/** Reads it with its host's row locked, so that exchanges of one host are one after another. */
export async function lockRefreshToken(tx: Queryable, hash: Buffer): Promise<RefreshToken | undefined> {
  const found = await tx
    .selectFrom("host_refresh_tokens")
    .select("host_id")
    .where("token_hash", "=", hash)
    .executeTakeFirst();
  if (!found) return undefined;
  const host = await tx
    .selectFrom("hosts")
    .select(["epoch", "deleted_at", "revoked_at"])
    .where("id", "=", found.host_id)
    .forUpdate()
    .executeTakeFirst();
  const row = await tx
    .selectFrom("host_refresh_tokens as token")
    .select("host_id")
    .select(sql<boolean>`expires_at <= now()`.as("is_expired"))
    .select(
      sql<boolean>`exists (select from host_refresh_tokens child
        where child.parent_hash = token.token_hash and child.used_at is not null)
        or exists (select from host_refresh_tokens sibling
        where sibling.parent_hash = token.parent_hash and sibling.token_hash <> token.token_hash
          and sibling.used_at is not null)`.as("is_outrun"),
    )
    .where("token_hash", "=", hash)
    .executeTakeFirst();
  if (!host || !row) return undefined;
  return {
    hash,
    hostId: row.host_id,
    isExpired: row.is_expired,
    isOutrun: row.is_outrun,
    epoch: host.epoch,
    hostEnd: toHostEnd(host),
  };
}

export async function insertRefreshToken(
  tx: Queryable,
  input: { hash: Buffer; hostId: HostId; parent?: Buffer; validMs: number },
): Promise<void> {
  await tx
    .insertInto("host_refresh_tokens")
    .values({
      token_hash: input.hash,
      host_id: input.hostId,
      parent_hash: input.parent ?? null,
      expires_at: sql<Date>`now() + ${interval(input.validMs)}`,
    })
    .execute();
}

/** As long as it counts, it counts as long as the successor that it gets now. */
export async function markRefreshTokenUsed(tx: Queryable, hash: Buffer, validMs: number): Promise<void> {
  await tx
    .updateTable("host_refresh_tokens")
    .set({
      used_at: sql<Date>`coalesce(used_at, now())`,
      expires_at: sql<Date>`now() + ${interval(validMs)}`,
    })
    .where("token_hash", "=", hash)
    .execute();
}

/** Keeps the newest unused successors of a token: a host that never hears an answer can't fill the table. */
export async function pruneSuccessors(tx: Queryable, parent: Buffer, keep: number): Promise<void> {
  await tx
    .deleteFrom("host_refresh_tokens")
    .where("token_hash", "in", (query) =>
      query
        .selectFrom("host_refresh_tokens")
        .select("token_hash")
        .where("parent_hash", "=", parent)
        .where("used_at", "is", null)
        .orderBy("created_at", "desc")
        .offset(keep),
    )
    .execute();
}

/** All of a host's (a new registration, a theft), or only those that are too old. */
export async function deleteRefreshTokens(
  tx: Queryable,
  hostId: HostId,
  which: "all" | "expired",
): Promise<void> {
  let query = tx.deleteFrom("host_refresh_tokens").where("host_id", "=", hostId);
  if (which === "expired") query = query.where("expires_at", "<=", sql<Date>`now()`);
  await query.execute();
}
