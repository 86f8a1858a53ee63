/**
 * Registration: a one-time token becomes this host's credentials.
 *
 * If the answer is lost on its way, the token is spent and nothing is stored:
 * the operator asks the control plane for another one.
 */
import { createHash, generateKeyPairSync } from "node:crypto";
import { RookeryError } from "@rookery/protocol/errors";
import { publicKeyOf } from "../rpc/auth.ts";
import { TokenRefused } from "./control-plane-client.ts";
import type { ControlPlaneClient, HostDescription } from "./control-plane-client.ts";
import type { Credentials, CredentialStore } from "./credentials.ts";

export const REGISTER_FAILPOINTS = ["register.request", "register.store"] as const;

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
  if (!isNewRegistration(store.current, token)) return;
  const { publicKey, privateKey } = generateKeyPairSync("ed25519");
  const spki = publicKey.export({ format: "der", type: "spki" }).toString("base64");
  await reach("register.request.before");
  const answer = await client
    .register(token, { ...host, publicKey: spki }, signal)
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
