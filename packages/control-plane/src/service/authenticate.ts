/**
 * API keys → callers. A key seen lately is known without asking the database;
 * one that is deleted is forgotten at once on this replica, and within the
 * cache's few seconds on others.
 */
import { createHash } from "node:crypto";
import { RookeryError } from "@rookery/protocol/errors";
import { findApiKey, touchApiKey } from "../db/api-keys.ts";
import type { ApiKeyId } from "../model/ids.ts";
import type { Deps } from "./deps.ts";
import { Recent } from "./recent.ts";
import type { Caller } from "./services.ts";

const KEY = /^(?:rk|e2b)_([0-9a-f]{40})$/;

/** What is stored: of the hex alone, since both prefixes name the same key. */
export const hashKey = (hex: string): Buffer => createHash("sha256").update(hex).digest();

export class Authenticator {
  readonly #deps: Pick<Deps, "db" | "clock" | "options">;
  readonly #known: Recent<Caller>;

  constructor(deps: Pick<Deps, "db" | "clock" | "options">) {
    this.#deps = deps;
    const { cacheMs: forMs, cacheSize: size } = deps.options;
    this.#known = new Recent({ size, forMs, now: () => deps.clock.now() });
  }

  async authenticate(presented: string): Promise<Caller> {
    const hex = KEY.exec(presented)?.[1];
    if (hex === undefined) throw unknownKey();
    const hash = hashKey(hex);
    const cacheKey = hash.toString("base64");
    const known = this.#known.get(cacheKey);
    if (known) return known;
    const caller = await this.#look(hash, this.#deps.clock.now());
    this.#known.set(cacheKey, caller);
    return caller;
  }

  forget(id: ApiKeyId): void {
    this.#known.deleteWhere(({ keyId }) => keyId === id);
  }

  async #look(hash: Buffer, now: number): Promise<Caller> {
    const { db, options } = this.#deps;
    const key = await findApiKey(db, hash);
    if (!key) throw unknownKey();
    if (key.lastUsedAt === undefined || now - key.lastUsedAt.getTime() >= options.keyTouchMs) {
      await touchApiKey(db, key.id, options.keyTouchMs);
    }
    return { keyId: key.id, teamId: key.teamId, role: key.role };
  }
}

function unknownKey(): RookeryError {
  return new RookeryError("unauthenticated", "The API key is missing, malformed or unknown.");
}
