/** One short text for the set of sandboxes on this host, so that a difference is seen without listing them. */
import { createHash } from "node:crypto";

export interface DigestedSandbox {
  id: string;
  phase: string;
  generation: bigint;
}

/** SHA-256 (hex) over the sorted lines `id:phase:generation`, each ended by a line feed. */
export function digestOfSandboxes(sandboxes: Iterable<DigestedSandbox>): string {
  const lines = Array.from(sandboxes, ({ id, phase, generation }) => `${id}:${phase}:${generation}\n`);
  return createHash("sha256").update(lines.sort().join("")).digest("hex");
}
