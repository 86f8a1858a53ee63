/**
 * Registration: a one-time token becomes this host's credentials.
 *
 * The key comes first and is durable. If the answer is lost on its way, or we
 * die before it is stored, the next try shows the same token with a proof that
 * we have the key that it was spent with, and gets another answer: until one is
 * used, and no clock says when. Anyone else is refused.
 */
import { createHash, createPublicKey } from "node:crypto";
import type { KeyObject } from "node:crypto";
import { RookeryError } from "@rookery/protocol/errors";
import { SignJWT } from "jose";
import { CONTROL_PLANE_ISSUER, publicKeyOf } from "../rpc/auth.ts";
import { TokenRefused } from "./control-plane-client.ts";
import type { ControlPlaneClient, HostDescription } from "./control-plane-client.ts";
import type { Credentials, CredentialStore } from "./credentials.ts";

export const REGISTER_FAILPOINTS = [
  "register.key",
  "register.request",
  "register.store",
  "register.clear",
] as const;

export interface RegisterDeps {
  client: ControlPlaneClient;
  store: CredentialStore;
  controlPlaneUrl: string;
  /** Failpoint, by its name. */
  reach: (name: string) => void | Promise<void>;
}

/** Does this token ask for a registration? Not if the credentials came from this very one: flags of a unit file stay. */
export function isNewRegistration(current: Credentials | undefined, token: string): boolean {
  return current?.registeredWith !== hashOf(token);
}

/** Throws `invalid_token` when the control plane refuses the token, `unavailable` when it can't be asked. */
export async function registerHost(
  { client, store, controlPlaneUrl, reach }: RegisterDeps,
  token: string,
  host: Omit<HostDescription, "publicKey">,
  signal: AbortSignal,
): Promise<void> {
  if (!isNewRegistration(store.current, token)) {
    // What we may have died before.
    await store.clearRegistration();
    return;
  }
  await reach("register.key.before");
  const privateKey = await store.registrationKey(hashOf(token));
  await reach("register.key.after");
  const spki = createPublicKey(privateKey).export({ format: "der", type: "spki" }).toString("base64");
  const proof = await proofOf(privateKey, token);
  await reach("register.request.before");
  const answer = await client
    .register(token, { ...host, publicKey: spki }, proof, signal)
    .catch((cause: unknown) => {
      throw failureOf(cause);
    });
  await reach("register.request.after");
  publicKeyOf(answer.control_plane_key); // a key that can't verify anything would lock everyone out: fail here
  await reach("register.store.before");
  await store.replace({
    version: 1,
    controlPlaneUrl,
    hostId: answer.host_id,
    clusterId: answer.cluster_id,
    controlPlaneKey: answer.control_plane_key,
    accessToken: answer.access_token,
    refreshToken: answer.refresh_token,
    privateKey: privateKey.export({ format: "der", type: "pkcs8" }).toString("base64"),
    address: host.address,
    certificateFingerprint: host.certificateFingerprint,
    registeredWith: hashOf(token),
  });
  await reach("register.store.after");
  await reach("register.clear.before");
  await store.clearRegistration();
  await reach("register.clear.after");
}

/** Without an end: what it is good for ends with the first use of the answer. */
function proofOf(key: KeyObject, token: string): Promise<string> {
  return new SignJWT({ purpose: "register", token: hashOf(token) })
    .setProtectedHeader({ alg: "EdDSA" })
    .setAudience(CONTROL_PLANE_ISSUER)
    .sign(key);
}

function hashOf(token: string): string {
  return createHash("sha256").update(token).digest("hex");
}

function failureOf(cause: unknown): RookeryError {
  if (cause instanceof TokenRefused) {
    const message =
      "The control plane refuses the registration token: it is unknown, expired, or another agent has used it. Ask for a new one (POST /v1/hosts/HOST/token).";
    return new RookeryError("invalid_token", message, { cause });
  }
  const words = cause instanceof Error ? cause.message : String(cause);
  return new RookeryError("unavailable", `The host could not be registered: ${words}`, { cause });
}
