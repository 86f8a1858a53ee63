/**
 * Settles rows whose work was not finished in time: the replica that was at it
 * died, or lost its host in the middle.
 *
 * Any replica claims them over a partial index; the claim raises the generation,
 * so whoever was at it can't move the row any more. Then the host is asked, and
 * the row becomes what is true. A round ends with its lease at the latest; until
 * then a host that hangs holds up its own rows only.
 */
import pLimit, { type LimitFunction } from "p-limit";
import { findHostEndpoint } from "../db/hosts.ts";
import { dropExpiredIdempotencyKeys } from "../db/idempotency.ts";
import {
  HOST_SILENT,
  type SandboxSummaryRecord,
  claimOverdueSandboxes,
  extendDeadline,
  moveSandbox,
} from "../db/sandboxes.ts";
import { type SnapshotRecord, claimOverdueSnapshots } from "../db/snapshots.ts";
import type { HostId } from "../model/ids.ts";
import { forgetSnapshot } from "./forget-snapshot.ts";
import { type HostDeps, endSandbox, settleSandbox } from "./settle.ts";
import { within } from "./within.ts";

export interface SweepOptions {
  batch: number;
  /** How long this replica may take to settle what it claimed. */
  leaseMs: number;
  /** Until the next look at what a host is still at. */
  againMs: number;
  /** The same where the host is silent. */
  silentAgainMs: number;
}

/** Settling at once, per host. */
const PARALLEL = 2;

export class DeadlineSweep {
  readonly #deps: HostDeps;
  readonly #options: SweepOptions;

  constructor(deps: HostDeps, options: SweepOptions) {
    this.#deps = deps;
    this.#options = options;
  }

  /** How many rows were claimed. */
  async round(): Promise<number> {
    const { db } = this.#deps;
    const { batch: limit, leaseMs } = this.#options;
    // From before the claim: what we are at must not outlast it.
    const lease = AbortSignal.timeout(leaseMs);
    const sandboxes = await claimOverdueSandboxes(db, { limit, leaseMs });
    const snapshots = await claimOverdueSnapshots(db, { limit, leaseMs });
    const gates = new Map<HostId | undefined, LimitFunction>();
    const gated = ({ id, hostId }: { id: string; hostId?: HostId }, settle: () => Promise<void>) => {
      const gate = gates.get(hostId) ?? pLimit(PARALLEL);
      gates.set(hostId, gate);
      return gate(() => this.#guard(id, lease, settle));
    };
    await Promise.all([
      ...sandboxes.map((row) => gated(row, () => this.#settle(row))),
      ...snapshots.map((row) => gated(row, () => this.#forget(row))),
    ]);
    await dropExpiredIdempotencyKeys(db, limit);
    return sandboxes.length + snapshots.length;
  }

  /** What can't be settled now is overdue again when our lease ends. */
  async #guard(id: string, lease: AbortSignal, settle: () => Promise<void>): Promise<void> {
    if (lease.aborted) return;
    try {
      await within(lease, settle());
    } catch (cause) {
      this.#deps.log.warn({ err: cause, id }, "an overdue row could not be settled yet");
    }
  }

  async #settle(row: SandboxSummaryRecord): Promise<void> {
    const { db, pool } = this.#deps;
    if (row.hostId === undefined) return this.#settleUnplaced(row);
    const host = await findHostEndpoint(db, row.hostId);
    if (!host || host.status === "unreachable") return this.#settleSilent(row);
    const agent = pool.agent(host);
    if (row.status === "stopping") {
      await endSandbox(this.#deps, agent, row);
      await moveSandbox(db, row, "gone");
      return;
    }
    const settled = await settleSandbox(this.#deps, agent, row, await agent.getSandbox(row.id));
    if (settled.kind === "at-work") await extendDeadline(db, row, this.#options.againMs);
  }

  async #settleUnplaced(row: SandboxSummaryRecord): Promise<void> {
    const { db } = this.#deps;
    if (row.status === "stopping") await moveSandbox(db, row, "gone");
    else await moveSandbox(db, row, "died", { error: { code: "no_capacity", message: "No host took it." } });
  }

  /** Nobody can say what became of it until its host returns. */
  async #settleSilent(row: SandboxSummaryRecord): Promise<void> {
    const { db } = this.#deps;
    if (row.status === "stopping") await extendDeadline(db, row, this.#options.silentAgainMs);
    else await moveSandbox(db, row, "hostLost", { reason: HOST_SILENT });
  }

  async #forget(row: SnapshotRecord): Promise<void> {
    await forgetSnapshot(this.#deps, row.id);
  }
}
