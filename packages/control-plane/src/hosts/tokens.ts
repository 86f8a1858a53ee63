/**
 * Tokens that this cluster signs (EdDSA, its one key): what proves a host to us,
 * and what proves us to a host. The audiences keep the two apart.
 */
import { createHash, createPublicKey } from "node:crypto";
import { RookeryError } from "@rookery/protocol/errors";
import { SignJWT, jwtVerify } from "jose";
import type { HostProof } from "../db/hosts.ts";
import { type HostId, isHostId } from "../model/ids.ts";
import type { Cluster } from "./cluster.ts";

/** Agents demand it of every token that commands them. */
const ISSUER = "rookery-control-plane";
const AUDIENCE = "rookery-control-plane";
const ALGORITHM = "EdDSA";
/** Life of a token that commands a host, and how long one is used again. */
const COMMAND_SEC = 60;
const REUSE_MS = 30_000;
const LEEWAY_SEC = 60;

export const hashToken = (token: string): Buffer => createHash("sha256").update(token).digest();

export async function signHostAccess(
  cluster: Cluster,
  host: { id: HostId } & HostProof,
  options: { validMs: number; nowMs: number },
): Promise<string> {
  const now = Math.floor(options.nowMs / 1000);
  return new SignJWT({ epoch: host.epoch, refresh: host.refreshHash?.toString("base64url") })
    .setProtectedHeader({ alg: ALGORITHM })
    .setIssuer(ISSUER)
    .setAudience(AUDIENCE)
    .setSubject(host.id)
    .setIssuedAt(now)
    .setExpirationTime(now + Math.floor(options.validMs / 1000))
    .sign(cluster.signingKey);
}

/** Whose it is and of which epoch; whether that epoch still counts is the host's row to say. */
export async function verifyHostAccess(
  cluster: Cluster,
  token: string,
  nowMs: number,
): Promise<{ id: HostId } & HostProof> {
  try {
    const { payload } = await jwtVerify(token, cluster.verifyingKey, {
      algorithms: [ALGORITHM],
      issuer: ISSUER,
      audience: AUDIENCE,
      requiredClaims: ["exp", "sub"],
      clockTolerance: LEEWAY_SEC,
      currentDate: new Date(nowMs),
    });
    const { sub, epoch, refresh } = payload;
    if (sub === undefined || !isHostId(sub) || typeof epoch !== "number")
      throw new Error("claims are missing");
    return {
      id: sub,
      epoch,
      refreshHash: typeof refresh === "string" ? Buffer.from(refresh, "base64url") : undefined,
    };
  } catch (cause) {
    throw new RookeryError("invalid_token", "The access token is not valid.", { cause });
  }
}

/**
 * Is `proof` signed with the private half of `publicKey` (SPKI in base64), over
 * this registration token? Nobody else can have made it.
 */
export async function provesRegistrant(proof: string, publicKey: string, token: string): Promise<boolean> {
  try {
    const key = createPublicKey({ key: Buffer.from(publicKey, "base64"), format: "der", type: "spki" });
    const { payload } = await jwtVerify(proof, key, { algorithms: [ALGORITHM], audience: AUDIENCE });
    return payload["purpose"] === "register" && payload["token"] === hashToken(token).toString("hex");
  } catch {
    return false; // whatever it is, it proves nothing
  }
}

/**
 * Says to a host's agent that the host was deleted: it destroys all that it has.
 * Signed, since an answer alone could come from whoever stands between us.
 */
export async function signEndHost(
  cluster: Pick<Cluster, "signingKey">,
  host: HostId,
  nowMs: number,
): Promise<string> {
  const now = Math.floor(nowMs / 1000);
  return new SignJWT({ purpose: "end-host" })
    .setProtectedHeader({ alg: ALGORITHM })
    .setIssuer(ISSUER)
    .setAudience(host)
    .setIssuedAt(now)
    .setExpirationTime(now + COMMAND_SEC)
    .sign(cluster.signingKey);
}

/** Signs what commands a host; the same one serves for half its life. */
export function commandTokens(cluster: Cluster, now: () => number): (host: HostId) => Promise<string> {
  const known = new Map<HostId, { token: Promise<string>; madeAt: number }>();
  return (host) => {
    const at = now();
    const last = known.get(host);
    if (last && at - last.madeAt < REUSE_MS && at >= last.madeAt) return last.token;
    // Hosts that are gone leave nothing behind for long.
    for (const [id, { madeAt }] of known) if (at - madeAt >= COMMAND_SEC * 1000) known.delete(id);
    const iat = Math.floor(at / 1000);
    const token = new SignJWT({})
      .setProtectedHeader({ alg: ALGORITHM })
      .setIssuer(ISSUER)
      .setAudience(host)
      .setIssuedAt(iat)
      .setExpirationTime(iat + COMMAND_SEC)
      .sign(cluster.signingKey);
    known.set(host, { token, madeAt: at });
    return token;
  };
}
