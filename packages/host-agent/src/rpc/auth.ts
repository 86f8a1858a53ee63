/**
 * Who may command this agent: the control plane that it registered with, by a
 * short-lived EdDSA JWT whose audience is this host's id.
 *
 * Invariants: the algorithm is fixed, never the token's choice; a token without
 * an expiry is no token; before registration nobody may command.
 */
import { createPublicKey } from "node:crypto";
import type { KeyObject } from "node:crypto";
import { RookeryError } from "@rookery/protocol/errors";
import { jwtVerify } from "jose";
import type { JWTPayload } from "jose";
import type { Clock } from "../sandbox-manager/clock.ts";

export const CONTROL_PLANE_ISSUER = "rookery-control-plane";
/** Clocks of two machines may differ by so much. */
const LEEWAY_SEC = 60;
/** The control plane makes tokens for 60 s; one that lives much longer is not its work. */
const MAX_LIFE_SEC = 300;
/** The same token comes with every call for a while: its signature is checked once. */
const MAX_KNOWN_TOKENS = 64;

export interface Trust {
  hostId: string;
  clusterId: string;
  /** Ed25519 public key of the control plane, SPKI (DER) in base64. */
  controlPlaneKey: string;
}

export class TokenVerifier {
  readonly #trust: () => Trust | undefined;
  readonly #clock: Clock;
  readonly #knownUntil = new Map<string, number>();
  #key: { text: string; key: KeyObject } | undefined;

  /** `trust` is asked at each call: registration happens while the server runs. */
  constructor(trust: () => Trust | undefined, clock: Clock) {
    this.#trust = trust;
    this.#clock = clock;
  }

  /** Throws `unauthenticated` or `invalid_token`. */
  async verify(authorization: string | null): Promise<Trust> {
    const trust = this.#trust();
    if (trust === undefined) throw new RookeryError("unauthenticated", "This host is not registered yet");
    const token = /^Bearer ([\w-]+\.[\w-]+\.[\w-]+)$/.exec(authorization ?? "")?.[1];
    if (token === undefined) throw new RookeryError("unauthenticated", "A bearer token is required");
    if (this.#key?.text !== trust.controlPlaneKey) {
      this.#key = { text: trust.controlPlaneKey, key: publicKeyOf(trust.controlPlaneKey) };
      this.#knownUntil.clear();
    }
    const cacheKey = `${trust.hostId} ${token}`;
    const now = this.#clock.nowMs();
    const known = this.#knownUntil.get(cacheKey);
    if (known !== undefined && now < known) return trust;
    const expiresAtMs = await this.#check(token, this.#key.key, trust.hostId, now);
    if (this.#knownUntil.size >= MAX_KNOWN_TOKENS) {
      const [oldest] = this.#knownUntil.keys();
      this.#knownUntil.delete(oldest!);
    }
    this.#knownUntil.set(cacheKey, expiresAtMs + LEEWAY_SEC * 1000);
    return trust;
  }

  async #check(token: string, key: KeyObject, hostId: string, nowMs: number): Promise<number> {
    try {
      const payload = await verifyStatement(token, key, hostId, nowMs);
      // A statement for another purpose is no command.
      if (payload["purpose"] !== undefined) throw new Error("the token is for something else");
      return payload.exp! * 1000;
    } catch (cause) {
      throw new RookeryError("invalid_token", "The token is not valid for this host", { cause });
    }
  }
}

/**
 * Does the control plane itself say that this host was deleted? An answer of a
 * server says so too, but whoever stands between can forge that, and what
 * follows can't be undone.
 */
export async function provesHostEnd(proof: string, trust: Trust, nowMs: number): Promise<boolean> {
  try {
    const key = publicKeyOf(trust.controlPlaneKey);
    return (await verifyStatement(proof, key, trust.hostId, nowMs))["purpose"] === "end-host";
  } catch {
    return false;
  }
}

async function verifyStatement(
  token: string,
  key: KeyObject,
  hostId: string,
  nowMs: number,
): Promise<JWTPayload> {
  const { payload } = await jwtVerify(token, key, {
    algorithms: ["EdDSA", "Ed25519"],
    issuer: CONTROL_PLANE_ISSUER,
    audience: hostId,
    clockTolerance: LEEWAY_SEC,
    currentDate: new Date(nowMs),
    maxTokenAge: MAX_LIFE_SEC,
    requiredClaims: ["exp"],
  });
  return payload;
}

export function publicKeyOf(spkiBase64: string): KeyObject {
  const key = createPublicKey({ key: Buffer.from(spkiBase64, "base64"), format: "der", type: "spki" });
  if (key.asymmetricKeyType !== "ed25519") throw new Error("the control plane's key is not an Ed25519 key");
  return key;
}
