/**
 * Ends a sandbox, from whatever status; returns when its resources are gone.
 * Again, or at the same time from elsewhere, it is the same end. Where its host
 * is silent the row says `stopping`, and the end comes when the host returns.
 */
import { findHostEndpoint } from "../db/hosts.ts";
import { type SandboxRecord, findSandbox, moveSandbox } from "../db/sandboxes.ts";
import { releaseVm } from "../hosts/settle.ts";
import type { HostId, SandboxId } from "../model/ids.ts";
import { isFinal } from "../model/sandbox-state.ts";
import type { Deps } from "./deps.ts";
import { noSandbox } from "./errors.ts";
import { holdRow } from "./hold-row.ts";
import type { Caller } from "./services.ts";

export async function destroySandbox(deps: Deps, caller: Caller, id: SandboxId): Promise<void> {
  for (;;) {
    const row = await findSandbox(deps.db, caller.teamId, id);
    if (!row) throw noSandbox();
    if (isFinal(row.status) || (await endOnce(deps, row))) return;
    // It moved in between: look again.
  }
}

async function endOnce(deps: Deps, row: SandboxRecord): Promise<boolean> {
  const { db, pool, clock, options } = deps;
  const stopping =
    row.status === "stopping" ? row : await moveSandbox(db, row, "destroy", { deadlineMs: options.leaseMs });
  if (!stopping) return false;
  if (stopping.hostId === undefined) return (await moveSandbox(db, stopping, "gone")) !== undefined;
  const host = await findHostEndpoint(db, stopping.hostId);
  if (!host || host.status === "unreachable") return true;
  // The same generation joins a destroy that is under way already.
  const { generation } = stopping;
  const deadline = new Date(clock.now() + options.destroyMs);
  await holdRow(deps, stopping, () =>
    pool.agent(host).destroySandbox({ sandboxId: row.id, generation, deadline }),
  );
  if (stopping.movingFrom) await endCopy(deps, stopping, stopping.movingFrom);
  return (await moveSandbox(db, stopping, "gone")) !== undefined;
}

/** What its former host kept; the monitor ends it when that does not answer. */
async function endCopy(deps: Deps, row: SandboxRecord, hostId: HostId): Promise<void> {
  const host = await findHostEndpoint(deps.db, hostId);
  if (host?.status === "online") await releaseVm(deps, deps.pool.agent(host), row);
}
