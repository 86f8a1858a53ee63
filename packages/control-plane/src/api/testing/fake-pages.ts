/** Pages of what fake services hold in memory. */
import { RookeryError } from "@rookery/protocol/errors";
import type { Page } from "../../service/services.ts";

export interface PageInput {
  limit: number;
  cursor?: string;
}

/** The cursor says how many came before: good enough where nothing is added meanwhile. */
export function page<T extends { createdAt: Date }>(all: T[], { limit, cursor }: PageInput): Page<T> {
  const from = cursor === undefined ? 0 : Number(Buffer.from(cursor, "base64url").toString());
  if (!Number.isInteger(from)) {
    throw new RookeryError("invalid_request", "cursor is not one of ours", {
      details: { field: "cursor", reason: "is not one of ours" },
    });
  }
  const newestFirst = all.toReversed();
  const items = newestFirst.slice(from, from + limit);
  const next = from + items.length;
  return next < all.length
    ? { items, nextCursor: Buffer.from(String(next)).toString("base64url") }
    : { items };
}
