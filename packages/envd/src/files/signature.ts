/** E2B's signed URLs of /files: who has the signature needs no token. */
import { createHash } from "node:crypto";
import { HttpError } from "../errors.ts";
import { equalSecrets } from "../guest-state.ts";

export interface SignedRequest {
  /** Raw value of the query; absent is the empty string. */
  path: string;
  operation: "read" | "write";
  /** Raw value of the query; absent is the empty string. */
  username: string;
  signature: string | undefined;
  /** Unix seconds. */
  expiration: string | undefined;
}

export function signatureOf(
  { path, operation, username, expiration }: Omit<SignedRequest, "signature">,
  accessToken: string,
): string {
  const parts = [path, operation, username, accessToken];
  if (expiration !== undefined) parts.push(expiration);
  const hash = createHash("sha256").update(parts.join(":")).digest("base64");
  return `v1_${hash.replaceAll("=", "")}`;
}

/** The texts are E2B's: its clients compare them. */
export function checkSignature(request: SignedRequest, accessToken: string, nowMs: number): void {
  const { signature, expiration } = request;
  if (signature === undefined) throw new HttpError(401, "missing signature query parameter");
  // A number is signed in its plainest form, as Go prints it.
  if (expiration !== undefined && !/^-?(0|[1-9]\d{0,15})$/.test(expiration)) {
    throw new HttpError(400, "signature_expiration must be a number of seconds");
  }
  if (!equalSecrets(signature, signatureOf(request, accessToken))) {
    throw new HttpError(401, "invalid signature");
  }
  if (expiration !== undefined && Number(expiration) < Math.floor(nowMs / 1000)) {
    throw new HttpError(401, "signature is already expired");
  }
}
