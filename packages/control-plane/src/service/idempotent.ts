/**
 * The same key and request make one thing and give one answer, also when both
 * come at once: one works under a claim, the others wait for its answer. Work
 * that failed leaves the key free.
 *
 * A claim whose replica died runs out, and the next call takes over. What was
 * made by then is in the key's row, written in the transaction that made it: the
 * use case goes on with that instead of making another. Where the answer is
 * known in that transaction it goes in too, sealed, so that a secret that is
 * shown once can be shown again to a caller whose replica died.
 */
import { RookeryError } from "@rookery/protocol/errors";
import type { Queryable } from "../db/database.ts";
import {
  type IdempotencyClaim,
  bindIdempotencyKey,
  claimIdempotencyKey,
  letGoOfIdempotencyKey,
  renewIdempotencyClaim,
  storeIdempotentAnswer,
} from "../db/idempotency.ts";
import type { TeamId } from "../model/ids.ts";
import type { Deps } from "./deps.ts";

const FIRST_POLL_MS = 25;
const LAST_POLL_MS = 500;

export interface Answer {
  status: number;
  body: unknown;
}

/** What happens once per key. */
export interface Creation<Made> {
  /** Makes it, by a use case that is handed `held`; absent: the caller gave no key. */
  make(held?: HeldKey<Made>): Promise<Made>;
  /** Shapes the answer; pure, since it may be called within a transaction. */
  answer(made: Made): Answer;
}

type Needs = Pick<Deps, "db" | "clock" | "ids" | "sealer" | "options" | "log">;

/** The claim went to another call in the middle: what we were about to write must not be. */
export class ClaimLost extends Error {}

/** A key that a use case works under; it writes nothing for good without it. */
export class HeldKey<Made> {
  /** What a call before made under this key, and did not live to answer. */
  readonly resourceId: string | undefined;
  readonly #deps: Needs;
  readonly #claim: IdempotencyClaim;
  readonly #creation: Creation<Made>;
  #isAnswered = false;

  constructor(
    deps: Needs,
    claim: IdempotencyClaim,
    creation: Creation<Made>,
    resourceId: string | undefined,
  ) {
    this.#deps = deps;
    this.#claim = claim;
    this.#creation = creation;
    this.resourceId = resourceId;
  }

  /** In the transaction that writes the resource's row; throws to undo it when another call took over. */
  async bind(tx: Queryable, resourceId: string): Promise<void> {
    if (!(await bindIdempotencyKey(tx, this.#claim, resourceId))) throw new ClaimLost();
  }

  /** The same, where all of the answer is known in that transaction. */
  async complete(tx: Queryable, resourceId: string, made: Made): Promise<void> {
    await this.bind(tx, resourceId);
    if (!(await this.#store(tx, this.#creation.answer(made)))) throw new ClaimLost();
    this.#isAnswered = true;
  }

  /** Stores the answer unless that has been done, and gives it. */
  async answer(made: Made): Promise<Answer> {
    const answer = this.#creation.answer(made);
    // False: we were so slow that another call took over. It answers the same, about the same resource.
    if (!this.#isAnswered && !(await this.#store(this.#deps.db, answer))) {
      this.#deps.log.warn(
        { team: this.#claim.teamId },
        "an Idempotency-Key was taken over while its work went on",
      );
    }
    return answer;
  }

  #store(db: Queryable, { status, body }: Answer): Promise<boolean> {
    const plain = Buffer.from(JSON.stringify(body ?? null));
    const sealedBody = this.#deps.sealer.seal("idempotent-answer", plain);
    return storeIdempotentAnswer(db, this.#claim, { status, sealedBody });
  }
}

export async function idempotent<Made>(
  deps: Needs,
  request: { teamId: TeamId; key: string; fingerprint: string },
  creation: Creation<Made>,
): Promise<Answer> {
  const { clock, options } = deps;
  const giveUpAt = clock.now() + options.idempotencyWaitMs;
  for (let pollMs = FIRST_POLL_MS; ; pollMs = Math.min(pollMs * 2, LAST_POLL_MS)) {
    const claim: IdempotencyClaim = { ...request, claim: deps.ids.text(20) };
    const claimed = await claimIdempotencyKey(deps.db, claim, {
      leaseMs: options.idempotencyLeaseMs,
      keepMs: options.idempotencyKeepMs,
    });
    if (claimed.kind === "claimed") {
      const answer = await workUnder(
        deps,
        claim,
        new HeldKey(deps, claim, creation, claimed.resourceId),
        creation,
      );
      if (answer) return answer;
    } else if (claimed.fingerprint !== request.fingerprint) {
      throw new RookeryError("idempotency_mismatch", "This Idempotency-Key was used for another request.");
    } else if (claimed.kind === "answered") {
      const body = deps.sealer.open("idempotent-answer", claimed.sealedBody).toString("utf8");
      return { status: claimed.status, body: JSON.parse(body) as unknown };
    }
    if (clock.now() >= giveUpAt) {
      throw new RookeryError("timeout", "Another request with this Idempotency-Key is still under way.");
    }
    await clock.sleep(pollMs);
  }
}

/** Undefined: another call took over before anything was made, and has the answer. */
async function workUnder<Made>(
  deps: Needs,
  claim: IdempotencyClaim,
  held: HeldKey<Made>,
  creation: Creation<Made>,
): Promise<Answer | undefined> {
  const done = new AbortController();
  const renewing = renew(deps, claim, done.signal);
  try {
    const made = await makeOrLetGo(deps, claim, held, creation);
    return made && (await held.answer(made.made));
  } finally {
    done.abort();
    await renewing;
  }
}

/** Only work that failed lets go of the key: where storing its answer fails, the claim runs out instead. */
async function makeOrLetGo<Made>(
  deps: Needs,
  claim: IdempotencyClaim,
  held: HeldKey<Made>,
  creation: Creation<Made>,
): Promise<{ made: Made } | undefined> {
  try {
    return { made: await creation.make(held) };
  } catch (cause) {
    if (cause instanceof ClaimLost) return undefined;
    try {
      await letGoOfIdempotencyKey(deps.db, claim);
    } catch (again) {
      deps.log.warn({ err: again, team: claim.teamId }, "the claim of an Idempotency-Key has to run out");
    }
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
