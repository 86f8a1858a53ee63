/**
 * One short text for the sandboxes of a host, so that agent and database see
 * whether they agree without listing them (docs/adr/0018).
 *
 * Each sandbox that stands still adds a term: the first 8 bytes (big endian) of
 * the SHA-256 of `ID:STATUS:GENERATION`. The digest is all terms by exclusive
 * or, so that one sandbox's change is one step and no order matters. Work under
 * way adds nothing. The database computes the same in SQL (sandbox_digest_term
 * in the control plane's migrations); testing/sandbox-digest-vectors.ts holds
 * both to one answer.
 */
import { createHash } from "node:crypto";

export interface DigestedSandbox {
  id: string;
  /** The host's phase, or the row's status: both sides name what stands still alike. */
  status: string;
  /** Of the last command that reached the host. */
  generation: bigint;
}

const STANDS_STILL: ReadonlySet<string> = new Set(["running", "paused", "failed", "missing"]);

/** `x1:` and 16 hex digits; what begins otherwise is another definition's, and equals none of this one. */
export function digestOfSandboxes(sandboxes: Iterable<DigestedSandbox>): string {
  let digest = 0n;
  for (const sandbox of sandboxes) if (STANDS_STILL.has(sandbox.status)) digest ^= termOf(sandbox);
  return `x1:${digest.toString(16).padStart(16, "0")}`;
}

function termOf({ id, status, generation }: DigestedSandbox): bigint {
  return createHash("sha256").update(`${id}:${status}:${generation}`).digest().readBigUInt64BE();
}
