/**
 * The network between replicas, agents and callers: messages that are refused,
 * lost, late, or carried out although their answer never came.
 *
 * A silent link behaves as TCP does: what was sent arrives when the silence ends
 * before the sender's patience; after that the sender gives up, and what it had
 * sent may arrive all the same.
 */
import { setTimeout as sleep } from "node:timers/promises";
import type { Direction } from "../schedule.ts";
import type { Random } from "../random.ts";

export interface Link {
  host: number;
  replica: number;
  way: Exclude<Direction, "both">;
}

export interface Trouble {
  kind: "cut" | "silence" | "loss";
  host: number;
  replica?: number | undefined;
  direction: Direction;
  /** For `loss`: of the messages. */
  share?: number;
  delayMs?: number;
}

interface Active extends Trouble {
  ended: Promise<void>;
  end(): void;
}

/** As a session's pings find out that nobody answers. */
const PATIENCE_MS = 250;
const LATE_MS = 400;

export class Network {
  readonly #troubles = new Set<Active>();
  readonly #random: Random;
  readonly #pace: number;
  #lossToCallers = 0;
  /** Deliveries whose sender has given up: they are waited for at the end. */
  readonly #late = new Set<Promise<unknown>>();

  constructor(random: Random, pace: number) {
    this.#random = random;
    this.#pace = pace;
  }

  begin(trouble: Trouble, ms: number): void {
    const { promise: ended, resolve } = Promise.withResolvers<void>();
    const active: Active = {
      ...trouble,
      ended,
      end: () => {
        clearTimeout(timer);
        this.#troubles.delete(active);
        resolve();
      },
    };
    const timer = setTimeout(() => active.end(), ms * this.#pace);
    this.#troubles.add(active);
  }

  loseCallers(share: number, ms: number): void {
    this.#lossToCallers = share;
    setTimeout(() => (this.#lossToCallers = 0), ms * this.#pace).unref();
  }

  /** For each of a caller's requests: lost before, lost after, or neither. */
  callersLuck(): "request-lost" | "answer-lost" | "fine" {
    if (!this.#random.chance(this.#lossToCallers)) return "fine";
    return this.#random.chance(0.5) ? "request-lost" : "answer-lost";
  }

  async heal(): Promise<void> {
    this.#lossToCallers = 0;
    for (const trouble of this.#troubles) trouble.end();
    await Promise.allSettled(this.#late);
  }

  /** Carries a request to its end and the answer back; `broken` makes the error that the sender sees. */
  async carry<T>(link: Link, deliver: () => Promise<T>, broken: (code: string) => Error): Promise<T> {
    const reached = await this.pass(link);
    if (reached !== "fine") {
      if (reached !== "refused" && this.#random.chance(0.4)) this.#deliverLate(link, deliver);
      throw broken(reached === "refused" ? "ECONNREFUSED" : "ETIMEDOUT");
    }
    const answer = await deliver();
    if ((await this.pass(link)) !== "fine") throw broken("ECONNRESET");
    return answer;
  }

  /** What becomes of one message. */
  async pass(link: Link): Promise<"fine" | "refused" | "lost"> {
    for (const trouble of this.#troubles) {
      if (!concerns(trouble, link)) continue;
      if (trouble.kind === "cut") return "refused";
      if (trouble.kind === "silence") {
        const over = await Promise.race([
          trouble.ended.then(() => true),
          sleep(PATIENCE_MS * this.#pace, false),
        ]);
        if (!over) return "lost";
        continue;
      }
      if (trouble.delayMs) await sleep(this.#random.between(0, trouble.delayMs) * this.#pace);
      if (this.#random.chance(trouble.share ?? 0)) return "lost";
    }
    return "fine";
  }

  #deliverLate(link: Link, deliver: () => Promise<unknown>): void {
    const late = (async () => {
      const silence = [...this.#troubles].find(
        (trouble) => trouble.kind === "silence" && concerns(trouble, link),
      );
      await (silence?.ended ?? sleep(this.#random.between(0, LATE_MS) * this.#pace));
      await deliver();
    })();
    const settled: Promise<void> = late.catch(() => undefined).finally(() => this.#late.delete(settled));
    this.#late.add(settled);
  }
}

function concerns(trouble: Active, { host, replica, way }: Link): boolean {
  return (
    trouble.host === host &&
    (trouble.replica === undefined || trouble.replica === replica) &&
    (trouble.direction === "both" || trouble.direction === way)
  );
}

/** What `work` brings, or the reason of `signal`, whichever comes first. */
export async function orAborted<T>(signal: AbortSignal, work: Promise<T>): Promise<T> {
  const { promise, reject } = Promise.withResolvers<never>();
  const abort = (): void => reject(signal.reason);
  if (signal.aborted) abort();
  signal.addEventListener("abort", abort, { once: true });
  try {
    return await Promise.race([work, promise]);
  } finally {
    signal.removeEventListener("abort", abort);
    work.catch(() => undefined);
  }
}
