/**
 * Keyset pages, newest first, by (created_at, id): a page costs the same
 * however deep it lies, and rows made meanwhile shift nothing.
 *
 * A cursor names the last row seen. It is opaque to callers, not a secret: it
 * only says where to go on among the rows that they may see anyway.
 */
import { RookeryError } from "@rookery/protocol/errors";
import { type RawBuilder, sql } from "kysely";

export interface PageRequest {
  limit: number;
  cursor?: string | undefined;
}

export interface Paged<T> {
  items: T[];
  nextCursor?: string;
}

const CURSOR = /^(\d{1,14}):([a-z0-9-]{1,64})$/;

function encodeCursor(row: { id: string; createdAt: Date }): string {
  return Buffer.from(`${row.createdAt.getTime()}:${row.id}`).toString("base64url");
}

/** SQL for "older than the cursor"; true for a first page. */
export function olderThan(cursor: string | undefined, table: string): RawBuilder<boolean> {
  if (cursor === undefined) return sql`true`;
  const match = CURSOR.exec(Buffer.from(cursor, "base64url").toString("latin1"));
  if (!match) {
    throw new RookeryError("invalid_request", "The cursor is not one that a list has answered.", {
      details: { field: "cursor", reason: "not a cursor" },
    });
  }
  const createdAt = new Date(Number(match[1]));
  return sql`(${sql.ref(`${table}.created_at`)}, ${sql.ref(`${table}.id`)}) < (${createdAt}, ${match[2]})`;
}

/** `rows` were asked for with a limit one higher than the page's: the last one only says that there are more. */
export function toPage<T extends { id: string; createdAt: Date }>(rows: T[], limit: number): Paged<T> {
  const items = rows.slice(0, limit);
  const last = items.at(-1);
  return rows.length > limit && last ? { items, nextCursor: encodeCursor(last) } : { items };
}
