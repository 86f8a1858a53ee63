/**
 * New ids, out of the injected randomness.
 */
import type { LayerId, VmId } from "../ids.ts";
import type { Deps } from "./deps.ts";

const ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789";

export function newVmId(deps: Pick<Deps, "randomBytes">): VmId {
  return `vm${randomText(deps, 16)}` as VmId;
}

export function newLayerId(deps: Pick<Deps, "randomBytes">): LayerId {
  return `ly${randomText(deps, 16)}` as LayerId;
}

export function randomHex(deps: Pick<Deps, "randomBytes">, byteCount: number): string {
  return Buffer.from(deps.randomBytes(byteCount)).toString("hex");
}

/** 36 does not divide 256: the letters' unequal odds cost less than half a bit over the whole id. */
function randomText(deps: Pick<Deps, "randomBytes">, length: number): string {
  return Array.from(deps.randomBytes(length), (byte) => ALPHABET[byte % ALPHABET.length]).join("");
}
