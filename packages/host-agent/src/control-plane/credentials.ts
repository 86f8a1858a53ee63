/**
 * What this host proves itself with, and whom it obeys: DATA/credentials.json,
 * 0600, replaced as a whole and made durable before anything of it is used. Until
 * it is registered, DATA/registration.json has the key that it registers with.
 */
import { createPrivateKey, generateKeyPairSync } from "node:crypto";
import type { KeyObject } from "node:crypto";
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
/** A registration that was begun. */
const registrationSchema = z.object({
  version: z.literal(1),
  /** SHA-256 of the token, hex. */
  tokenHash: z.string(),
  /** PKCS #8 (DER) in base64. */
  privateKey: z.string().min(1),
});
export type Credentials = Readonly<z.output<typeof credentialsSchema>>;

export class CredentialStore {
  readonly #path: string;
  readonly #registrationPath: string;
  #current: Credentials | undefined;

  private constructor(path: string, current: Credentials | undefined) {
    this.#path = path;
    this.#registrationPath = join(dirname(path), "registration.json");
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

  /**
   * The key to register with by this token: made and durable before the token is
   * shown, and the same one at each further try. By it the control plane knows
   * that whoever shows the token again is the one who spent it.
   */
  async registrationKey(tokenHash: string): Promise<KeyObject> {
    const begun = await this.#readRegistration();
    if (begun?.tokenHash === tokenHash) {
      return createPrivateKey({ key: Buffer.from(begun.privateKey, "base64"), format: "der", type: "pkcs8" });
    }
    const { privateKey } = generateKeyPairSync("ed25519");
    const text = privateKey.export({ format: "der", type: "pkcs8" }).toString("base64");
    await writeFileAtomic(
      this.#registrationPath,
      `${JSON.stringify({ version: 1, tokenHash, privateKey: text })}\n`,
      { mode: 0o600, sync: true },
    );
    return privateKey;
  }

  async clearRegistration(): Promise<void> {
    await removeTree(this.#registrationPath);
  }

  async #readRegistration(): Promise<z.output<typeof registrationSchema> | undefined> {
    try {
      return await readJson(this.#registrationPath, registrationSchema);
    } catch (cause) {
      if (isErrno(cause, "ENOENT")) return undefined;
      throw cause;
    }
  }

  /** From here on the host obeys nobody, also after a crash. */
  async markEnded(): Promise<void> {
    if (this.#current !== undefined) await this.replace({ ...this.#current, ended: true });
  }

  async forget(): Promise<void> {
    await removeTree(this.#path);
    await removeTree(this.#registrationPath);
    await syncDirectory(dirname(this.#path));
    this.#current = undefined;
  }
}
