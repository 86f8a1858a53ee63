/**
 * Brings a row to what its host says, by compare-and-set: when the row moved
 * meanwhile, nothing happens, and whoever moved it sees to it.
 *
 * A VM whose row became final is released on its host; if that fails, the
 * monitor finds it in its next round.
 */
import type { Database } from "../db/database.ts";
import type { HostRecord } from "../db/hosts.ts";
import {
  type MovePatch,
  type SandboxRecord,
  type SandboxSummaryRecord,
  adoptCommandGeneration,
  findSandboxes,
  moveSandbox,
} from "../db/sandboxes.ts";
import type { Clock } from "../model/clock.ts";
import type { HostId, SandboxId } from "../model/ids.ts";
import type { Log } from "../model/log.ts";
import { isFinal, nextStatus } from "../model/sandbox-state.ts";
import type { AgentSandbox, HostAgent } from "./host-agent.ts";
import type { HostClientPool } from "./host-client-pool.ts";
import { judge } from "./judge.ts";

export interface HostDeps {
  db: Database;
  pool: HostClientPool;
  clock: Clock;
  log: Log;
}

/** How long a host may take to end a sandbox. */
export const DESTROY_MS = 60_000;

/** Undefined: the host never registered. */
export function agentOf(pool: HostClientPool, host: HostRecord): HostAgent | undefined {
  const { id, address, certificateFingerprint, epoch } = host;
  return address === undefined ? undefined : pool.agent({ id, address, certificateFingerprint, epoch });
}

export type Settled<Row = SandboxRecord> =
  /** As it should be, or brought to it; `row` is how it stands now. */
  | { kind: "settled"; row: Row | SandboxRecord }
  | { kind: "at-work" }
  /** The row moved first, or can't be trusted. */
  | { kind: "left-alone" };

/** `because` says why a host was asked, where that is more than the host's phase says. */
export async function settleSandbox<Row extends SandboxSummaryRecord>(
  deps: HostDeps,
  agent: HostAgent,
  row: Row,
  seen: AgentSandbox | undefined,
  because?: { code: string; message: string },
): Promise<Settled<Row>> {
  if (seen && seen.generation > row.generation) {
    // The row may have moved between our reading it and the host's answer.
    const [now] = await findSandboxes(deps.db, [row.id]);
    if (now && now.generation >= seen.generation) return { kind: "left-alone" };
    // A database restored from a backup. Its host knows better, and is not told to destroy anything.
    deps.log.error(
      { sandbox: row.id, host: row.hostId, ours: `${row.generation}`, its: `${seen.generation}` },
      "a host knows a newer generation of a sandbox than the database: was an older backup restored?",
    );
    return { kind: "left-alone" };
  }
  const verdict = judge(row.status, seen);
  if (verdict.kind === "agrees") {
    if (seen && seen.generation !== row.commandGeneration)
      await adoptCommandGeneration(deps.db, row, seen.generation);
    return { kind: "settled", row };
  }
  if (verdict.kind === "at-work") return { kind: "at-work" };
  const event = verdict.kind === "destroy" ? "gone" : verdict.event;
  if (row.movingFrom && nextStatus(row.status, "moveBack") && (event === "died" || event === "gone"))
    return await takeBack(deps, agent, { ...row, movingFrom: row.movingFrom }, because);
  // Before a create is given up, its host has to refuse the command that may still be on its way.
  const endsFirst = verdict.kind === "destroy" || (row.status === "starting" && event === "died");
  if (endsFirst) await endSandbox(deps, agent, row);
  const error = verdict.kind === "move" && verdict.error ? (because ?? verdict.error) : undefined;
  const reason = row.movingFrom && event === "seenRunning" ? MOVED : undefined;
  const moved = await moveSandbox(deps.db, row, event, { ...factsOf(seen), error, reason });
  if (!moved) return { kind: "left-alone" };
  if (isFinal(moved.status) && seen && !endsFirst) await releaseVm(deps, agent, moved);
  return { kind: "settled", row: moved };
}

/** Why a sandbox runs on another host than it was paused on. */
const MOVED = "moved";

/**
 * It does not run on the host that was to bring it up, and never will: that host
 * has refused the command, or ended what it had, before its copy on the former
 * one is all that there is. Throws when that is not known to have happened.
 */
export async function takeBack(
  deps: HostDeps,
  agent: HostAgent,
  row: SandboxSummaryRecord & { movingFrom: HostId },
  because = { code: "host_error", message: "The resume on another host did not happen." },
): Promise<Settled<never>> {
  await endSandbox(deps, agent, row);
  const moved = await moveSandbox(deps.db, row, "moveBack", { hostId: row.movingFrom, error: because });
  return moved ? { kind: "settled", row: moved } : { kind: "left-alone" };
}

/** What a host's answer says beside the phase. */
export function factsOf(seen: AgentSandbox | undefined): MovePatch {
  if (!seen) return {};
  return {
    startedAt: seen.startedAt,
    expiresAt: (seen.phase === "running" && seen.expiresAt) || null,
    diskUsedBytes: seen.diskUsedBytes,
    commandGeneration: seen.generation,
  };
}

/** Ends it on its host, whatever is there; throws when that is not known to have happened. */
export async function endSandbox(
  deps: Pick<HostDeps, "clock">,
  agent: HostAgent,
  row: { id: SandboxId; generation: bigint },
): Promise<void> {
  await agent.destroySandbox({
    sandboxId: row.id,
    generation: row.generation,
    deadline: new Date(deps.clock.now() + DESTROY_MS),
  });
}

/** The same for what no row needs any more: a failure is the monitor's to repeat. */
export async function releaseVm(
  deps: Pick<HostDeps, "clock" | "log">,
  agent: HostAgent,
  row: { id: SandboxId; generation: bigint },
): Promise<void> {
  try {
    await endSandbox(deps, agent, row);
  } catch (cause) {
    deps.log.warn({ err: cause, sandbox: row.id }, "a sandbox that ended could not be released yet");
  }
}
