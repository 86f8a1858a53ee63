/**
 * The same key and request give the same answer, also when both come at once:
 * one works under a claim, the others wait for its answer. Work that failed
 * leaves the key free. A claim whose replica died runs out, and the next call
 * takes over.
 */
import { RookeryError } from "@rookery/protocol/errors";
import {
  type IdempotencyClaim,
  claimIdempotencyKey,
  releaseIdempotencyClaim,
  renewIdempotencyClaim,
  storeIdempotentAnswer,
} from "../db/idempotency.ts";
import type { TeamId } from "../model/ids.ts";
import type { Deps } from "./deps.ts";

const FIRST_POLL_MS = 25;
const LAST_POLL_MS = 500;

interface Answer {
  status: number;
  body: unknown;
}

type Needs = Pick<Deps, "db" | "clock" | "ids" | "sealer" | "options" | "log">;

export async function idempotent(
  deps: Needs,
  request: { teamId: TeamId; key: string; fingerprint: string },
  work: () => Promise<Answer>,
): Promise<Answer> {
  const { clock, options } = deps;
  const claim: IdempotencyClaim = { ...request, claim: deps.ids.text(20) };
  const giveUpAt = clock.now() + options.idempotencyWaitMs;
  for (let pollMs = FIRST_POLL_MS; ; pollMs = Math.min(pollMs * 2, LAST_POLL_MS)) {
    const claimed = await claimIdempotencyKey(deps.db, claim, {
      leaseMs: options.idempotencyLeaseMs,
      keepMs: options.idempotencyKeepMs,
    });
    if (claimed.kind === "claimed") return workUnder(deps, claim, work);
    if (claimed.fingerprint !== request.fingerprint) {
      throw new RookeryError("idempotency_mismatch", "This Idempotency-Key was used for another request.");
    }
    if (claimed.kind === "answered") {
      const body = deps.sealer.open("idempotent-answer", claimed.sealedBody).toString("utf8");
      return { status: claimed.status, body: JSON.parse(body) as unknown };
    }
    if (clock.now() >= giveUpAt) {
      throw new RookeryError("timeout", "Another request with this Idempotency-Key is still under way.");
    }
    await clock.sleep(pollMs);
  }
}

async function workUnder(deps: Needs, claim: IdempotencyClaim, work: () => Promise<Answer>): Promise<Answer> {
  const done = new AbortController();
  const renewing = renew(deps, claim, done.signal);
  try {
    const answer = await workOrRelease(deps, claim, work);
    const plain = Buffer.from(JSON.stringify(answer.body ?? null));
    const sealedBody = deps.sealer.seal("idempotent-answer", plain);
    // False: we were so slow that another call took over. Both did the work; each tells its own caller.
    const isStored = await storeIdempotentAnswer(deps.db, claim, { status: answer.status, sealedBody });
    if (!isStored)
      deps.log.warn({ team: claim.teamId }, "an Idempotency-Key was taken over while its work went on");
    return answer;
  } finally {
    done.abort();
    await renewing;
  }
}

/** Only work that failed frees the key: where storing its answer fails, the claim runs out instead. */
async function workOrRelease(
  deps: Needs,
  claim: IdempotencyClaim,
  work: () => Promise<Answer>,
): Promise<Answer> {
  try {
    return await work();
  } catch (cause) {
    await releaseIdempotencyClaim(deps.db, claim);
    throw cause;
  }
}

async function renew(deps: Needs, claim: IdempotencyClaim, done: AbortSignal): Promise<void> {
  const { idempotencyLeaseMs: leaseMs } = deps.options;
  while (!done.aborted) {
    await deps.clock.sleep(leaseMs / 3, done);
    if (done.aborted) return;
    try {
      if (!(await renewIdempotencyClaim(deps.db, claim, leaseMs))) return;
    } catch (cause) {
      deps.log.warn({ err: cause }, "the claim of an Idempotency-Key was not renewed");
    }
  }
}
