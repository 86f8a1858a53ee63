/**
 * What became of a sandbox that an earlier call made under the same
 * Idempotency-Key before its replica died. Its row is waited for until it is
 * settled, by the sweep where nobody is at it any more. One that has run is
 * answered as it stands now, whatever it came to since; one that never ran is
 * answered with the reason, as the first call would have been.
 */
import { RookeryError, isErrorCode } from "@rookery/protocol/errors";
import { type SandboxRecord, findSandbox } from "../db/sandboxes.ts";
import type { SandboxId } from "../model/ids.ts";
import type { Deps } from "./deps.ts";
import { silentHost, wrongState } from "./errors.ts";
import type { Caller } from "./services.ts";

const FIRST_POLL_MS = 25;
const LAST_POLL_MS = 500;

/** Undefined: there is no such row, so nothing was made. */
export async function awaitMade(
  { db, clock, options }: Pick<Deps, "db" | "clock" | "options">,
  { teamId }: Caller,
  id: SandboxId,
): Promise<SandboxRecord | undefined> {
  const giveUpAt = clock.now() + options.idempotencyWaitMs;
  for (let pollMs = FIRST_POLL_MS; ; pollMs = Math.min(pollMs * 2, LAST_POLL_MS)) {
    const row = await findSandbox(db, teamId, id);
    if (!row || row.startedAt) return row;
    if (row.status !== "pending" && row.status !== "starting") throw neverRan(row);
    if (clock.now() >= giveUpAt) {
      throw new RookeryError("timeout", "The sandbox that this Idempotency-Key made is still starting.");
    }
    await clock.sleep(pollMs);
  }
}

function neverRan({ status, error }: SandboxRecord): RookeryError {
  if (status === "missing") return silentHost();
  if (!error) return wrongState(status, "it was ended while it started");
  return new RookeryError(isErrorCode(error.code) ? error.code : "internal", error.message);
}
