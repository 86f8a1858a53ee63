/**
 * News between replicas: "this team has new events", never what they say, which
 * whoever wants to know reads in the table.
 *
 * A replica that committed a change says so by NOTIFY, *after* the commit and in
 * a transaction that writes nothing: a NOTIFY within the change's own would make
 * all commits of the cluster take turns, each with its wait for the disk. So
 * news can get lost (a replica dies in between, the listening connection breaks).
 * It is a hint; a poll of the teams that somebody waits for, one query for all
 * of them, brings what it did not.
 */
import type { Client } from "pg";
import type { Clock } from "../model/clock.ts";
import type { TeamId } from "../model/ids.ts";

const CHANNEL = "rookery_team_news";
/** A payload ends at 8,000 bytes; a team's id has some 25. */
const TEAMS_PER_NOTICE = 200;
const FIRST_AGAIN_MS = 250;
const LAST_AGAIN_MS = 10_000;
/** A connection that is half open says nothing by itself. */
const PROBE_MS = 15_000;
const PROBE_LIMIT_MS = 5_000;

export interface TeamNewsOptions {
  Client: typeof Client;
  url: string;
  /** Sends notices: `select pg_notify(channel, payload)`. */
  notify(channel: string, payload: string): Promise<void>;
  /** The numbers of the last events of these teams. */
  lastEvents(teamIds: readonly TeamId[]): Promise<Map<TeamId, bigint>>;
  /** News did not get out, or in, for now: the poll brings it. */
  onError(cause: unknown, words: string): void;
}

/** Who waits for a team's news. */
export interface TeamWatch {
  /** Resolves with the next news, or the watch's end; taken *before* reading, nothing is missed in between. */
  readonly changed: Promise<void>;
}

export class TeamNews {
  readonly #options: TeamNewsOptions;
  readonly #watches = new Map<TeamId, Set<() => void>>();
  readonly #known = new Map<TeamId, bigint>();
  readonly #untold = new Set<TeamId>();
  #telling: Promise<void> | undefined;
  #isListening = false;

  constructor(options: TeamNewsOptions) {
    this.#options = options;
  }

  /** The LISTEN connection stands. */
  get isListening(): boolean {
    return this.#isListening;
  }

  /** Until `signal` aborts. */
  watch(teamId: TeamId, signal: AbortSignal): TeamWatch {
    let { promise, resolve } = Promise.withResolvers<void>();
    const wake = (): void => {
      resolve();
      ({ promise, resolve } = Promise.withResolvers<void>());
    };
    const watches = this.#watches.get(teamId) ?? new Set();
    this.#watches.set(teamId, watches.add(wake));
    const end = (): void => {
      wake();
      watches.delete(wake);
      if (watches.size > 0 || this.#watches.get(teamId) !== watches) return;
      this.#watches.delete(teamId);
      this.#known.delete(teamId);
    };
    if (signal.aborted) end();
    else signal.addEventListener("abort", end, { once: true });
    return {
      get changed() {
        return promise;
      },
    };
  }

  /** After the commit. Returns at once: what can't be sent now the poll will find. */
  tell(teamId: TeamId): void {
    this.#wake(teamId);
    this.#untold.add(teamId);
    // What comes while a notice is on its way goes out together with the next one.
    this.#telling ??= this.#tellAll().finally(() => {
      this.#telling = undefined;
    });
  }

  /** One look at all teams that somebody waits for. */
  async poll(): Promise<void> {
    const teamIds = [...this.#watches.keys()];
    if (teamIds.length === 0) return;
    for (const [teamId, last] of await this.#options.lastEvents(teamIds)) {
      if (this.#known.get(teamId) === last) continue;
      if (this.#watches.has(teamId)) this.#known.set(teamId, last);
      this.#wake(teamId);
    }
  }

  /** Listens until `signal` aborts, over one connection, which is opened again whenever it breaks. */
  async listen(clock: Clock, signal: AbortSignal): Promise<void> {
    for (let againMs = FIRST_AGAIN_MS; !signal.aborted; againMs = Math.min(2 * againMs, LAST_AGAIN_MS)) {
      try {
        await this.#listenOnce(clock, signal, () => {
          againMs = FIRST_AGAIN_MS;
        });
      } catch (cause) {
        if (!signal.aborted) this.#options.onError(cause, "no news from other replicas for now");
      }
      await clock.sleep(againMs, signal);
    }
  }

  /** What is on its way has arrived. */
  async settled(): Promise<void> {
    await this.#telling;
  }

  async #listenOnce(clock: Clock, signal: AbortSignal, onOpen: () => void): Promise<void> {
    const client = new this.#options.Client({
      connectionString: this.#options.url,
      connectionTimeoutMillis: PROBE_LIMIT_MS,
      query_timeout: PROBE_LIMIT_MS,
      keepAlive: true,
      application_name: "rookery-news",
    });
    const broken = new AbortController();
    client.on("error", (cause) => broken.abort(cause));
    client.on("end", () => broken.abort(new Error("the connection for news ended")));
    client.on("notification", ({ payload = "" }) => {
      // oxlint-disable-next-line typescript/no-unsafe-type-assertion -- only looked up among the ids that are known
      for (const teamId of payload.split(",")) this.#wake(teamId as TeamId);
    });
    try {
      await client.connect();
      await client.query(`listen ${CHANNEL}`);
      this.#isListening = true;
      onOpen();
      // What was said before we listened nobody told us.
      for (const teamId of this.#watches.keys()) this.#wake(teamId);
      while (!signal.aborted) {
        await clock.sleep(PROBE_MS, AbortSignal.any([signal, broken.signal]));
        broken.signal.throwIfAborted();
        if (!signal.aborted) await client.query("select 1");
      }
    } finally {
      this.#isListening = false;
      await client.end().catch(() => undefined);
    }
  }

  async #tellAll(): Promise<void> {
    while (this.#untold.size > 0) {
      const teamIds = [...this.#untold].slice(0, TEAMS_PER_NOTICE);
      for (const teamId of teamIds) this.#untold.delete(teamId);
      try {
        await this.#options.notify(CHANNEL, teamIds.join(","));
      } catch (cause) {
        this.#options.onError(cause, "other replicas were not told of news");
      }
    }
  }

  #wake(teamId: TeamId): void {
    for (const wake of [...(this.#watches.get(teamId) ?? [])]) wake();
  }
}
