/**
 * Who this cluster is, and its secrets: the key that signs tokens and the one
 * that envd access tokens are derived from. Made once, by whichever replica
 * comes first; sealed in the database with the key from the environment.
 */
import {
  type KeyObject,
  createHmac,
  createPrivateKey,
  createPublicKey,
  generateKeyPairSync,
} from "node:crypto";
import { z } from "zod";
import { findCluster, openClusterRow } from "../db/cluster.ts";
import type { Queryable } from "../db/database.ts";
import type { SandboxId } from "../model/ids.ts";
import type { NewIds, Random } from "../model/new-ids.ts";
import type { Sealer } from "../model/sealer.ts";

export interface Cluster {
  id: string;
  signingKey: KeyObject;
  verifyingKey: KeyObject;
  /** SPKI in base64: what hosts verify us with. */
  publicKey: string;
  /** What clients of a sandbox's envd present; recomputed, never stored. */
  envdAccessToken(sandbox: { id: SandboxId; tokenVersion: number }): string;
}

const Secrets = z.object({ signingKey: z.base64(), envdSecret: z.base64() });

export async function openCluster(
  db: Queryable,
  deps: { sealer: Sealer; ids: NewIds; random: Random },
): Promise<Cluster> {
  const row =
    (await findCluster(db)) ??
    (await openClusterRow(db, {
      id: `cluster-${deps.ids.text(20)}`,
      sealedSecrets: deps.sealer.seal(
        "cluster-secrets",
        Buffer.from(JSON.stringify(newSecrets(deps.random))),
      ),
    }));
  const secrets = openSecrets(deps.sealer, row.sealedSecrets);
  const signingKey = createPrivateKey({
    key: Buffer.from(secrets.signingKey, "base64"),
    format: "der",
    type: "pkcs8",
  });
  const verifyingKey = createPublicKey(signingKey);
  const envdSecret = Buffer.from(secrets.envdSecret, "base64");
  return {
    id: row.id,
    signingKey,
    verifyingKey,
    publicKey: verifyingKey.export({ format: "der", type: "spki" }).toString("base64"),
    envdAccessToken: ({ id, tokenVersion }) =>
      createHmac("sha256", envdSecret).update(`envd ${id} ${tokenVersion}`).digest("hex"),
  };
}

function newSecrets(random: Random): z.infer<typeof Secrets> {
  const { privateKey } = generateKeyPairSync("ed25519");
  return {
    signingKey: privateKey.export({ format: "der", type: "pkcs8" }).toString("base64"),
    envdSecret: Buffer.from(random(32)).toString("base64"),
  };
}

function openSecrets(sealer: Sealer, sealed: Buffer): z.infer<typeof Secrets> {
  let plain: Buffer;
  try {
    plain = sealer.open("cluster-secrets", sealed);
  } catch (cause) {
    throw new Error("the database was made with another ROOKERY_SECRET_KEY", { cause });
  }
  return Secrets.parse(JSON.parse(plain.toString("utf8")));
}
