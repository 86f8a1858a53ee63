/**
 * Registration: a one-time token becomes this host's credentials.
 *
 * If the answer is lost on its way, the token is spent and nothing is stored:
 * the operator asks the control plane for another one.
 */
import { createHash, generateKeyPairSync } from "node:crypto";
import { publicKeyOf } from "../rpc/auth.ts";
import type { ControlPlaneClient, HostDescription } from "./control-plane-client.ts";
import type { CredentialStore } from "./credentials.ts";

export const REGISTER_FAILPOINTS = ["register.request", "register.store"] as const;

export interface RegisterDeps {
  client: ControlPlaneClient;
  store: CredentialStore;
  controlPlaneUrl: string;
  /** Failpoint, by its name. */
  reach: (name: string) => void | Promise<void>;
}

/** Does nothing when the store's credentials came from this very token. */
export async function registerHost(
  { client, store, controlPlaneUrl, reach }: RegisterDeps,
  token: string,
  host: Omit<HostDescription, "publicKey">,
  signal: AbortSignal,
): Promise<void> {
  const registeredWith = createHash("sha256").update(token).digest("hex");
  if (store.current?.registeredWith === registeredWith) return;
  const { publicKey, privateKey } = generateKeyPairSync("ed25519");
  const spki = publicKey.export({ format: "der", type: "spki" }).toString("base64");
  await reach("register.request.before");
  const answer = await client.register(token, { ...host, publicKey: spki }, signal);
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
    registeredWith,
  });
  await reach("register.store.after");
}
