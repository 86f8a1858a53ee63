/**
 * Events for users: a sandbox's as a list, and a sandbox's or a team's as a
 * stream.
 *
 * A stream holds nothing but the number of the last event that it gave: what
 * comes next it reads from the table when it is asked, so a slow reader costs
 * no memory. It sleeps until there is news of its team. Since numbers have no
 * gaps, it knows when something is missing, and says so.
 */
import { RookeryError } from "@rookery/protocol/errors";
import { isDatabaseAway } from "../db/database.ts";
import {
  type SandboxEventRecord,
  listSandboxEvents,
  rangeOfEvents,
  sandboxEventsAfter,
} from "../db/sandbox-events.ts";
import { findSandbox } from "../db/sandboxes.ts";
import type { SandboxId, TeamId } from "../model/ids.ts";
import { isFinal } from "../model/sandbox-state.ts";
import type { Deps } from "./deps.ts";
import { noSandbox } from "./errors.ts";
import type { Caller, FollowEventsInput, FollowedEvent, Page, SandboxEvent } from "./services.ts";

/** Read at once; the next ones when these are taken. */
const BATCH = 100;
const AGAIN_MS = 1_000;

type Needs = Pick<Deps, "db" | "clock" | "options" | "log">;

/** Where a stream stands. */
interface Position {
  teamId: TeamId;
  sandboxId: SandboxId | undefined;
  after: bigint;
  /** Something between the reader's last event and `after` is gone. */
  isReset: boolean;
  /** Its sandbox has ended: no more than what is there will come. */
  isOver: boolean;
}

export class EventStreams {
  readonly #deps: Needs;
  readonly #open = new Map<TeamId, number>();

  constructor(deps: Needs) {
    this.#deps = deps;
  }

  async list(
    { teamId }: Caller,
    id: SandboxId,
    page: { limit: number; cursor?: string },
  ): Promise<Page<SandboxEvent>> {
    if (!(await findSandbox(this.#deps.db, teamId, id))) throw noSandbox();
    return listSandboxEvents(this.#deps.db, id, page);
  }

  async follow(
    { teamId }: Caller,
    { sandboxId, after }: FollowEventsInput,
    signal: AbortSignal,
  ): Promise<AsyncIterable<FollowedEvent> | undefined> {
    const { db } = this.#deps;
    const sandbox = sandboxId && (await findSandbox(db, teamId, sandboxId));
    if (sandboxId && !sandbox) throw noSandbox();
    const isOver = sandbox !== undefined && isFinal(sandbox.status);
    const start = await startOf(db, { teamId, sandboxId }, after);
    if (isOver && after !== undefined && !start.isReset) {
      const rest = await sandboxEventsAfter(db, { teamId, sandboxId }, start.after, 1);
      if (rest.length === 0) return undefined;
    }
    this.#admit(teamId, signal);
    return this.#read({ teamId, sandboxId, ...start, isOver }, signal);
  }

  #admit(teamId: TeamId, signal: AbortSignal): void {
    signal.throwIfAborted();
    const max = this.#deps.options.maxStreamsPerTeam;
    const open = this.#open.get(teamId) ?? 0;
    if (open >= max) {
      throw new RookeryError(
        "quota_exceeded",
        `The team has ${open} event streams open, of at most ${max}.`,
        {
          details: { max_streams: max },
        },
      );
    }
    this.#open.set(teamId, open + 1);
    const release = (): void => {
      const left = (this.#open.get(teamId) ?? 1) - 1;
      if (left > 0) this.#open.set(teamId, left);
      else this.#open.delete(teamId);
    };
    signal.addEventListener("abort", release, { once: true });
  }

  async *#read(at: Position, signal: AbortSignal): AsyncGenerator<FollowedEvent> {
    const { db } = this.#deps;
    const news = db.news.watch(at.teamId, signal);
    if (at.isReset) yield { kind: "reset", after: at.after };
    while (!signal.aborted) {
      // Before reading: what comes meanwhile wakes us.
      const { changed } = news;
      const events = await this.#next(at, signal);
      for (const event of events ?? []) {
        if (at.sandboxId === undefined && event.number !== at.after + 1n) {
          // Deleted before it was read: the reader was away for longer than events are kept.
          yield { kind: "reset", after: event.number - 1n };
        }
        at.after = event.number;
        at.isOver ||= at.sandboxId !== undefined && isFinal(event.status);
        yield { kind: "event", event };
        if (signal.aborted) return;
      }
      if (events?.length === BATCH) continue;
      if (events && at.isOver) return;
      if (events && !signal.aborted) await changed;
    }
  }

  /** Undefined: the database is away; it will be back. */
  async #next(at: Position, signal: AbortSignal): Promise<SandboxEventRecord[] | undefined> {
    try {
      return await sandboxEventsAfter(this.#deps.db, at, at.after, BATCH);
    } catch (cause) {
      if (!isDatabaseAway(cause)) throw cause;
      this.#deps.log.warn({ err: cause }, "a stream of events waits for the database");
      await this.#deps.clock.sleep(AGAIN_MS, signal);
      return undefined;
    }
  }
}

async function startOf(
  db: Deps["db"],
  { teamId, sandboxId }: { teamId: TeamId; sandboxId: SandboxId | undefined },
  after: bigint | undefined,
): Promise<Pick<Position, "after" | "isReset">> {
  const { oldest, last } = await rangeOfEvents(db, teamId);
  if (after === undefined) return { after: sandboxId === undefined ? last : 0n, isReset: false };
  // From the future: it was given by another database, or this one was restored from a backup.
  if (after > last) return { after: last, isReset: true };
  return after + 1n < oldest ? { after: oldest - 1n, isReset: true } : { after, isReset: false };
}
