/**
 * Looks at each host every so often, one replica at a time: is it alive, and do
 * its sandboxes and our rows agree?
 *
 * Passive: a host whose heartbeats stopped becomes `unreachable` and its running
 * sandboxes `missing`, but only if heartbeats could have been received all that
 * time. One that registered again and was never heard likewise. Active: a host
 * whose last heartbeat brought the digest that our rows have costs no more than
 * that (ADR 18). All others, and each one now and then, are compared: our rows
 * are read *first*, then the host is asked; differences are applied by
 * compare-and-set, so what moved meanwhile waits for the next round. Work under
 * way is not judged here but by the sweep of deadlines.
 *
 * What a host has and no row knows is the matter of strangers.ts.
 */
import pLimit from "p-limit";
import { touchReceptive } from "../db/cluster.ts";
import {
  type CompareReason,
  type DueHost,
  type HostRecord,
  claimDueHosts,
  markHostUnreachable,
  recordComparison,
} from "../db/hosts.ts";
import { type SandboxSummaryRecord, findSandboxes, liveSandboxesOfHost } from "../db/sandboxes.ts";
import { loseSandboxesOfHost } from "../db/sandboxes-of-host.ts";
import { recordSnapshotStored, unsentSnapshotsOfHost } from "../db/snapshot-copies.ts";
import type { HostId, SandboxId } from "../model/ids.ts";
import { isFinal, isWork } from "../model/sandbox-state.ts";
import { forgetCondemned } from "./forget-snapshot.ts";
import type { AgentSandbox, HostAgent } from "./host-agent.ts";
import { type HostDeps, agentOf, releaseVm, settleSandbox } from "./settle.ts";
import { STRANGER_KEEP_MS, treatStrangers, welcomeBack } from "./strangers.ts";
import { within } from "./within.ts";

export interface MonitorOptions {
  /** Between two checks of one host. */
  everyMs: number;
  /** Without a heartbeat: silent. */
  silentMs: number;
  /** One check of one host. */
  limitMs: number;
  /** Hosts claimed at once by one replica. */
  batch: number;
  /** Each host is compared so often, whatever its digest says. */
  compareEveryMs: number;
  /** Told of each check: why the host was compared, or that it was not. */
  onCheck?: (compared: CompareReason | "not") => void;
  /** How long a sandbox that no row knows is kept; a day unless told otherwise. */
  strangerKeepMs?: number;
}

/**
 * The part of the silence that counts (30 s of 90) for which no replica was
 * there: any longer, and heartbeats were lost through no fault of the hosts.
 */
const RECEPTIVE_GAP = 1 / 3;
const PAGE = 1_000;
/** Hosts that one round compares at once. */
const COMPARING = 50;
const SNAPSHOTS_AT_ONCE = 100;
/** Settling at once, per host: each is a few queries, some a call. */
const PARALLEL = 8;
/** How long a round waits for one sandbox to be released: the host goes on, and the next round looks again. */
const RELEASE_MS = 5_000;

export class HostMonitor {
  readonly #deps: HostDeps;
  readonly #options: MonitorOptions;

  constructor(deps: HostDeps, options: MonitorOptions) {
    this.#deps = deps;
    this.#options = options;
  }

  /**
   * Says that heartbeats can be received now; answers for how many milliseconds
   * without a gap. Called beside the rounds too: one that waits for hung hosts
   * is no time in which nobody listened.
   */
  hear(): Promise<number> {
    return touchReceptive(this.#deps.db, this.#options.silentMs * RECEPTIVE_GAP);
  }

  /** Checks the hosts that are due; a hung one delays only itself, and this round by its limit at most. */
  async round(signal: AbortSignal): Promise<void> {
    const { db, log } = this.#deps;
    const { batch: limit, everyMs, silentMs, compareEveryMs } = this.#options;
    const receptiveMs = await this.hear();
    const due = await claimDueHosts(db, { limit, everyMs, compareEveryMs, unheardMs: silentMs / 2 });
    const comparing = pLimit(COMPARING);
    const check = (host: DueHost): Promise<void> => this.#check(host, receptiveMs, signal);
    await Promise.all(due.map((host) => (host.compare ? comparing(check, host) : check(host))));
    if (due.length > 0) {
      const compared = due.filter(({ compare }) => compare !== undefined).length;
      log.debug({ hosts: due.length, compared }, "hosts were checked");
    }
  }

  async #check(host: DueHost, receptiveMs: number, signal: AbortSignal): Promise<void> {
    const { silentMs, limitMs } = this.#options;
    try {
      if (host.silentMs >= silentMs && receptiveMs >= silentMs) {
        await this.#giveUp(host);
        return;
      }
      // One that is silent but was not given up yet is asked too: only its heartbeats may fail.
      if (host.status !== "online") return;
      this.#options.onCheck?.(host.compare ?? "not");
      const limit = AbortSignal.timeout(limitMs);
      const both = AbortSignal.any([signal, limit]);
      const comparing = host.compare ? this.compare(host, both) : undefined;
      await within(limit, Promise.all([comparing, this.#lookAtSnapshots(host, both)]));
    } catch (cause) {
      if (!signal.aborted) this.#deps.log.warn({ err: cause, host: host.id }, "a host could not be checked");
    }
  }

  /** Also one that is `unreachable` already: since it registered, nothing was heard of it. */
  async #giveUp({ id, status }: HostRecord): Promise<void> {
    const { db, log } = this.#deps;
    const lost = await db.transaction().execute(async (tx) => {
      const isGivenUp = await markHostUnreachable(tx, id, this.#options.silentMs);
      return isGivenUp ? loseSandboxesOfHost(tx, id) : undefined;
    });
    if (lost !== undefined && (lost > 0 || status === "online"))
      log.warn({ host: id, missing: lost }, "a host went silent");
  }

  /** Holds all rows of a host against all that it has. */
  async compare(host: HostRecord, signal: AbortSignal): Promise<void> {
    const agent = agentOf(this.#deps.pool, host);
    if (!agent) return;
    const isWhole = await this.#compareWith(host, agent, signal);
    if (isWhole) await recordComparison(this.#deps.db, host.id);
  }

  async #compareWith(host: HostRecord, agent: HostAgent, signal: AbortSignal): Promise<boolean> {
    const rows = await this.#rowsOf(host.id);
    const seen = await this.#sandboxesOf(agent, signal);
    const limit = pLimit(PARALLEL);
    const judged = [...rows.values()].filter(({ status }) => !isWork(status));
    await Promise.all(
      judged.map((row) =>
        limit(async () => {
          if (!signal.aborted) await this.#settle(agent, row, seen.get(row.id), signal);
        }),
      ),
    );
    const unclaimed = [...seen.values()].filter(({ id }) => !rows.has(id));
    await this.#judgeUnclaimed(host, agent, { unclaimed, total: seen.size }, signal);
    return !signal.aborted;
  }

  async #settle(
    agent: HostAgent,
    row: SandboxSummaryRecord,
    seen: AgentSandbox | undefined,
    signal: AbortSignal,
  ): Promise<void> {
    const back = await welcomeBack(this.#deps, agent, seen, signal);
    if (back !== "not-yet") await settleSandbox(this.#deps, agent, row, back);
  }

  /** Deletions that it was not there for, and what it has sent to its object store. */
  async #lookAtSnapshots(host: HostRecord, signal: AbortSignal): Promise<void> {
    const { db } = this.#deps;
    const agent = agentOf(this.#deps.pool, host);
    if (!agent) return;
    await forgetCondemned(this.#deps, host.id, agent);
    if (host.storeId === undefined) return;
    const ids = await unsentSnapshotsOfHost(db, host.id, SNAPSHOTS_AT_ONCE);
    if (ids.length === 0) return;
    for (const { id, storeId } of await agent.storedSnapshots(ids, signal)) {
      if (ids.includes(id)) await recordSnapshotStored(db, id, storeId);
    }
  }

  /** What the host has, and no live row of it: ended rows' VMs go, strangers stay for now. */
  async #judgeUnclaimed(
    host: HostRecord,
    agent: HostAgent,
    { unclaimed, total }: { unclaimed: readonly AgentSandbox[]; total: number },
    signal: AbortSignal,
  ): Promise<void> {
    const { db, log } = this.#deps;
    const known = new Map<SandboxId, SandboxSummaryRecord>();
    for (let at = 0; at < unclaimed.length; at += PAGE) {
      const ids = unclaimed.slice(at, at + PAGE).map(({ id }) => id);
      for (const row of await findSandboxes(db, ids)) known.set(row.id, row);
    }
    const strangers = unclaimed.filter(({ id }) => !known.has(id));
    const { strangerKeepMs: keepMs = STRANGER_KEEP_MS } = this.#options;
    await treatStrangers(this.#deps, host, agent, { strangers, total, keepMs }, signal);
    const limit = pLimit(PARALLEL);
    await Promise.all(
      unclaimed.map(({ id, generation }) =>
        limit(async () => {
          const row = known.get(id);
          if (signal.aborted || !row) return;
          // Live rows of this host came into being since the rows were read.
          if (!isFinal(row.status) && (row.hostId === host.id || row.hostId === undefined)) return;
          // Paused, until it runs on the host that is told to bring it up.
          if (row.movingFrom === host.id && row.status !== "stopping") return;
          if (generation > row.generation) return;
          log.info(
            { host: host.id, sandbox: id, status: row.status },
            "a host still has a sandbox that is not its own any more",
          );
          await this.#release(agent, row, signal);
        }),
      ),
    );
  }

  /** The call keeps its own deadline, for clocks that differ; only we don't wait for all of it. */
  async #release(agent: HostAgent, row: SandboxSummaryRecord, signal: AbortSignal): Promise<void> {
    const limit = AbortSignal.any([signal, AbortSignal.timeout(RELEASE_MS)]);
    try {
      await within(limit, releaseVm(this.#deps, agent, row));
    } catch (cause) {
      if (!limit.aborted) throw cause;
      this.#deps.log.warn({ sandbox: row.id }, "a host is slow to release a sandbox");
    }
  }

  async #rowsOf(id: HostId): Promise<Map<SandboxId, SandboxSummaryRecord>> {
    const rows = new Map<SandboxId, SandboxSummaryRecord>();
    for (let after = ""; ;) {
      const page = await liveSandboxesOfHost(this.#deps.db, id, { after, limit: PAGE });
      for (const row of page) rows.set(row.id, row);
      const last = page.at(-1);
      if (page.length < PAGE || !last) return rows;
      after = last.id;
    }
  }

  async #sandboxesOf(agent: HostAgent, signal: AbortSignal): Promise<Map<SandboxId, AgentSandbox>> {
    const seen = new Map<SandboxId, AgentSandbox>();
    for (let after = ""; ;) {
      const { items, more } = await agent.listSandboxes({ after, limit: PAGE }, signal);
      for (const item of items) seen.set(item.id, item);
      const last = items.at(-1);
      // A host that says "more" without going on would hold us for ever.
      if (!more || !last || last.id <= after) return seen;
      after = last.id;
    }
  }
}
