/**
 * This host's own certificate: made at the first start that needs one, and kept
 * in DATA/certificate.pem (0600) with its key. Nobody vouches for it: the control plane
 * is told its fingerprint when the host registers, and speaks to no other.
 *
 * Invariant: key and certificate are one file, replaced as a whole, so that
 * whichever line a crash strikes there is a pair that fits, or none.
 */
import { createHash, createPrivateKey, generateKeyPairSync, sign, X509Certificate } from "node:crypto";
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { RookeryError } from "@rookery/protocol/errors";
import { writeFileAtomic } from "../host/atomic-file.ts";
import { isErrno } from "../host/errno.ts";

export interface HostCertificate {
  /** Certificate and key, PEM: what node:tls takes for both. */
  pem: string;
  /** SHA-256 of the certificate (DER), 64 hex digits. */
  fingerprint: string;
}

/** RFC 5280 §4.1.2.5: of what has no well-defined end. Its pin is taken back, never its date awaited. */
const NEVER = new Date("9999-12-31T23:59:59Z");
const COMMON_NAME = "2.5.4.3";
const ECDSA_WITH_SHA256 = "1.2.840.10045.4.3.2";

/** Durable when it returns. The caller holds the data directory's lock. Throws when the file is not a fitting pair. */
export async function openCertificate(
  dataDir: string,
  deps: { nowMs: () => number; randomBytes: (count: number) => Uint8Array },
): Promise<HostCertificate> {
  const path = join(dataDir, "certificate.pem");
  let pem: string;
  try {
    pem = await readFile(path, "utf8");
  } catch (cause) {
    if (!isErrno(cause, "ENOENT")) throw cause;
    pem = await makeCertificate(deps);
    await writeFileAtomic(path, pem, { mode: 0o600, sync: true });
  }
  return { pem, fingerprint: fingerprintOf(path, pem) };
}

function fingerprintOf(path: string, pem: string): string {
  try {
    const certificate = new X509Certificate(pem);
    if (!certificate.checkPrivateKey(createPrivateKey(pem))) throw new Error("the key is another's");
    return createHash("sha256").update(certificate.raw).digest("hex");
  } catch (cause) {
    throw new RookeryError(
      "invalid_request",
      `${path} does not hold this host's certificate and its key: put back the right file, or remove it and register the host again`,
      { cause },
    );
  }
}

async function makeCertificate({
  nowMs,
  randomBytes,
}: Parameters<typeof openCertificate>[1]): Promise<string> {
  // Once in a host's life: not worth the memory of every start.
  const [{ AsnConvert, OctetString }, x509] = await Promise.all([
    import("@peculiar/asn1-schema"),
    import("@peculiar/asn1-x509"),
  ]);
  const { publicKey, privateKey } = generateKeyPairSync("ec", { namedCurve: "P-256" });
  const algorithm = new x509.AlgorithmIdentifier({ algorithm: ECDSA_WITH_SHA256 });
  const name = new x509.Name([
    new x509.RelativeDistinguishedName([
      new x509.AttributeTypeAndValue({
        type: COMMON_NAME,
        value: new x509.AttributeValue({ utf8String: "rookery-agent" }),
      }),
    ]),
  ]);
  const extension = (extnID: string, critical: boolean, value: object) =>
    new x509.Extension({ extnID, critical, extnValue: new OctetString(AsnConvert.serialize(value)) });
  const body = new x509.TBSCertificate({
    version: x509.Version.v3,
    serialNumber: positive(randomBytes(16)),
    signature: algorithm,
    issuer: name,
    subject: name,
    validity: new x509.Validity({ notBefore: new Date(nowMs()), notAfter: NEVER }),
    subjectPublicKeyInfo: AsnConvert.parse(
      publicKey.export({ format: "der", type: "spki" }),
      x509.SubjectPublicKeyInfo,
    ),
    extensions: new x509.Extensions([
      extension(x509.id_ce_basicConstraints, true, new x509.BasicConstraints({ cA: false })),
      extension(x509.id_ce_extKeyUsage, false, new x509.ExtendedKeyUsage([x509.id_kp_serverAuth])),
    ]),
  });
  const certificate = new x509.Certificate({
    tbsCertificate: body,
    signatureAlgorithm: algorithm,
    signatureValue: exactly(sign("sha256", Buffer.from(AsnConvert.serialize(body)), privateKey)),
  });
  const der = Buffer.from(AsnConvert.serialize(certificate));
  return new X509Certificate(der).toString() + privateKey.export({ format: "pem", type: "pkcs8" }).toString();
}

/** As a DER integer: neither negative nor with a leading zero. */
function positive(bytes: Uint8Array): ArrayBuffer {
  bytes[0] = (bytes[0]! & 0x3f) | 0x40;
  return exactly(bytes);
}

/** Its own bytes, and no pool's around them. */
function exactly(bytes: Uint8Array): ArrayBuffer {
  return Uint8Array.from(bytes).buffer;
}
