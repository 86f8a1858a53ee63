/**
 * What this host proves itself with, and whom it obeys: DATA/credentials.json,
 * 0600, replaced as a whole and made durable before anything of it is used.
 */
import { dirname, join } from "node:path";
import { z } from "zod";
import { readJson, removeTree, syncDirectory, writeFileAtomic } from "../host/atomic-file.ts";
import { isErrno } from "../host/errno.ts";

const credentialsSchema = z.object({
  version: z.literal(1),
  controlPlaneUrl: z.url(),
  hostId: z.string().regex(/^host-[a-z0-9]{20}$/),
  clusterId: z.string().min(1).max(128),
  /** Ed25519 public key of the control plane, SPKI (DER) in base64. */
  controlPlaneKey: z.string().min(1),
  accessToken: z.string().min(1),
  refreshToken: z.string().min(1),
  /** Our own Ed25519 key, PKCS #8 (DER) in base64; the control plane has its public half. */
  privateKey: z.string().min(1),
  /** Where, and with which certificate, the control plane was told to find us. */
  address: z.string().optional(),
  certificateFingerprint: z.string().optional(),
  /** SHA-256 of the registration token that these came from: the same token again is no new registration. */
  registeredWith: z.string(),
  /** The host was deleted: nothing of this counts, and it is here only until all that the host has is destroyed. */
  ended: z.literal(true).optional(),
});
export type Credentials = Readonly<z.output<typeof credentialsSchema>>;

export class CredentialStore {
  readonly #path: string;
  #current: Credentials | undefined;

  private constructor(path: string, current: Credentials | undefined) {
    this.#path = path;
    this.#current = current;
  }

  static async open(dataDir: string): Promise<CredentialStore> {
    const path = join(dataDir, "credentials.json");
    try {
      return new CredentialStore(path, await readJson(path, credentialsSchema));
    } catch (cause) {
      if (isErrno(cause, "ENOENT")) return new CredentialStore(path, undefined);
      throw cause;
    }
  }

  /** Undefined for a host that nobody registered, or that has ended. */
  get current(): Credentials | undefined {
    return this.#current?.ended === true ? undefined : this.#current;
  }

  /** Was the host deleted, and is there something left of it? */
  get isEnding(): boolean {
    return this.#current?.ended === true;
  }

  /** Durable when it returns; only then does `current` change. */
  async replace(next: Credentials): Promise<void> {
    await writeFileAtomic(this.#path, `${JSON.stringify(next, undefined, 2)}\n`, { mode: 0o600, sync: true });
    this.#current = next;
  }

  /** From here on the host obeys nobody, also after a crash. */
  async markEnded(): Promise<void> {
    if (this.#current !== undefined) await this.replace({ ...this.#current, ended: true });
  }

  async forget(): Promise<void> {
    await removeTree(this.#path);
    await syncDirectory(dirname(this.#path));
    this.#current = undefined;
  }
}
