/**
 * New ids, drawn from injected randomness so that a simulated run replays.
 *
 * Each character is one of 36, without bias: bytes of 252 and above are thrown
 * away (252 = 7 * 36). 18 characters hold 93 bits.
 */
import assert from "node:assert/strict";
import {
  type ApiKeyId,
  type HostId,
  type SandboxId,
  type SnapshotId,
  type TeamId,
  isApiKeyId,
  isHostId,
  isSandboxId,
  isSnapshotId,
  isTeamId,
} from "./ids.ts";

export type Random = (size: number) => Uint8Array;

export interface NewIds {
  sandbox(): SandboxId;
  snapshot(): SnapshotId;
  host(): HostId;
  team(): TeamId;
  apiKey(): ApiKeyId;
  /** For what has no brand of its own: clusters, families of tokens, claims. */
  text(size: number): string;
}

const ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789";

export function newIds(random: Random): NewIds {
  const text = (size: number): string => {
    let out = "";
    while (out.length < size) {
      for (const byte of random(size + 8)) {
        if (byte < 252 && out.length < size) out += ALPHABET[byte % 36];
      }
    }
    return out;
  };
  return {
    sandbox: () => branded(`sb${text(18)}`, isSandboxId),
    snapshot: () => branded(`snap-${text(20)}`, isSnapshotId),
    host: () => branded(`host-${text(20)}`, isHostId),
    team: () => branded(`team-${text(20)}`, isTeamId),
    apiKey: () => branded(`key-${text(20)}`, isApiKeyId),
    text,
  };
}

function branded<T extends string>(text: string, isOne: (text: string) => text is T): T {
  assert(isOne(text));
  return text;
}
