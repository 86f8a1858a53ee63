/**
 * Seals what is kept in the database but must not be read from a copy of it:
 * AES-256-GCM with a key per purpose, derived (HKDF) from the one in the
 * environment. The purpose is authenticated too, so that one kind of sealed
 * text never passes for another. Two keys can be good at a time, so that
 * replicas that are restarted one by one can go over from one to the other.
 */
import { createCipheriv, createDecipheriv, hkdfSync } from "node:crypto";
import type { Random } from "./new-ids.ts";

const VERSION = 1;
const IV_BYTES = 12;
const TAG_BYTES = 16;

export type SealPurpose = "cluster-secrets" | "idempotent-answer";

export interface Sealer {
  seal(purpose: SealPurpose, plain: Uint8Array): Buffer;
  /** Throws when it was sealed with a key that is none of ours, or altered. */
  open(purpose: SealPurpose, sealed: Uint8Array): Buffer;
}

/** Seals with `secretKey`; opens what that one or one of `otherKeys` sealed. */
export function newSealer(secretKey: string, random: Random, otherKeys: readonly string[] = []): Sealer {
  const keyOf = (secret: string, purpose: SealPurpose): Buffer =>
    Buffer.from(hkdfSync("sha256", secret, "rookery", purpose, 32));
  return {
    seal(purpose, plain) {
      const iv = random(IV_BYTES);
      const cipher = createCipheriv("aes-256-gcm", keyOf(secretKey, purpose), iv);
      cipher.setAAD(Buffer.from(purpose));
      const body = Buffer.concat([cipher.update(plain), cipher.final()]);
      return Buffer.concat([Buffer.of(VERSION), iv, cipher.getAuthTag(), body]);
    },
    open(purpose, sealed) {
      if (sealed[0] !== VERSION || sealed.length < 1 + IV_BYTES + TAG_BYTES) {
        throw new Error(`this is no sealed ${purpose}`);
      }
      const bodyAt = 1 + IV_BYTES + TAG_BYTES;
      const openWith = (secret: string): Buffer => {
        const key = keyOf(secret, purpose);
        const decipher = createDecipheriv("aes-256-gcm", key, sealed.subarray(1, 1 + IV_BYTES));
        decipher.setAAD(Buffer.from(purpose));
        decipher.setAuthTag(sealed.subarray(1 + IV_BYTES, bodyAt));
        return Buffer.concat([decipher.update(sealed.subarray(bodyAt)), decipher.final()]);
      };
      const failures: unknown[] = [];
      for (const secret of [secretKey, ...otherKeys]) {
        try {
          return openWith(secret);
        } catch (cause) {
          failures.push(cause);
        }
      }
      throw new AggregateError(failures, `no key of ours opens this sealed ${purpose}`);
    },
  };
}
