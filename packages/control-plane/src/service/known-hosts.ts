/**
 * Hosts that may take a team's sandboxes, as this replica read them a moment
 * ago. With hundreds of hosts, reading them anew was the largest part of a create.
 *
 * Nothing is decided by it alone: the insert asks the database whether the
 * chosen host still takes sandboxes, and who finds no host here reads afresh.
 */
import { type HostRecord, schedulableHosts } from "../db/hosts.ts";
import type { TeamId } from "../model/ids.ts";
import type { Deps } from "./deps.ts";
import { Recent } from "./recent.ts";

/** No longer: until then a new host of another replica gets nothing, and a full one is asked in vain. */
const KNOWN_MS = 1_000;

export class KnownHosts {
  readonly #db: Deps["db"];
  readonly #recent: Recent<Promise<readonly HostRecord[]>>;

  constructor({ db, clock, options }: Pick<Deps, "db" | "clock" | "options">) {
    this.#db = db;
    this.#recent = new Recent({ size: options.cacheSize, forMs: KNOWN_MS, now: () => clock.now() });
  }

  /** Whoever asks while they are being read waits for the same answer. */
  async schedulable(teamId: TeamId): Promise<readonly HostRecord[]> {
    const known = this.#recent.get(teamId);
    if (known) return await known;
    const reading = this.readAnew(teamId);
    this.#recent.set(teamId, reading);
    try {
      return await reading;
    } catch (cause) {
      this.#recent.delete(teamId);
      throw cause;
    }
  }

  readAnew(teamId: TeamId): Promise<readonly HostRecord[]> {
    return schedulableHosts(this.#db, teamId);
  }

  /** A host came or returned. */
  forget(): void {
    this.#recent.deleteWhere(() => true);
  }
}
