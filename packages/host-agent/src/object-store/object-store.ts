/**
 * The seam to the object store that hosts share: whole, immutable-by-convention
 * objects under short keys. What lies in it was written by other hosts, so
 * nothing read from it is trusted before its hash was found right.
 *
 * Invariants: an object is there as a whole or not at all, whatever died
 * meanwhile; `put` has returned only when a power cut no longer loses it.
 */
import { RookeryError } from "@rookery/protocol/errors";

export interface ObjectFacts {
  bytes: number;
  /** Another one after each `put`: a download goes on only under the tag that it began with. */
  tag: string;
  /** By the store's clock. */
  modifiedMs: number;
}

export interface StoredObject {
  facts: ObjectFacts;
  body: AsyncIterable<Uint8Array>;
}

/** All of it throws `unavailable` when the store cannot be used now. */
export interface ObjectStore {
  readonly kind: "directory" | "s3";
  /** The same for all who use this store, different for every other; 64 hex digits that say nothing else. */
  identity(signal: AbortSignal): Promise<string>;
  head(key: string, signal: AbortSignal): Promise<ObjectFacts | undefined>;
  /** Replaces what is there. When `content` or `signal` fails, what was there stays. */
  put(key: string, content: AsyncIterable<Uint8Array>, signal: AbortSignal): Promise<void>;
  /** From byte `from` on, which is less than the object's size, or 0. `body` may be left unread if `signal` aborts. */
  get(key: string, options: { from: number }, signal: AbortSignal): Promise<StoredObject | undefined>;
  /** In no order. What is put or deleted meanwhile may be in it or not. */
  list(
    prefix: string,
    signal: AbortSignal,
  ): AsyncIterable<{ key: string; bytes: number; modifiedMs: number }>;
  /** Idempotent. */
  delete(key: string, signal: AbortSignal): Promise<void>;
  close(): void;
}

const KEY = /^[a-z0-9][a-z0-9._-]*(\/[a-z0-9][a-z0-9._-]*)*$/;
const MAX_KEY_BYTES = 200;

/** Keys stand in paths. */
export function assertKey(key: string): void {
  if (key.length > MAX_KEY_BYTES || !KEY.test(key)) throw new Error(`not a key of an object: ${key}`);
}

export function storeAway(what: string, cause: unknown): RookeryError {
  return new RookeryError("unavailable", `The object store cannot be used now: ${what}.`, { cause });
}
