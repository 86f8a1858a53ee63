/** Reading sandboxes, and changing what is no status. */
import { RookeryError } from "@rookery/protocol/errors";
import { findHostEndpoint } from "../db/hosts.ts";
import { type SandboxRecord, changeSandbox, findSandbox, listSandboxes } from "../db/sandboxes.ts";
import { factsOf, settleSandbox } from "../hosts/settle.ts";
import type { SandboxId } from "../model/ids.ts";
import { isFinal } from "../model/sandbox-state.ts";
import type { Sandbox, SandboxSummary } from "../model/sandbox.ts";
import type { Deps } from "./deps.ts";
import { noSandbox, silentHost, wrongState } from "./errors.ts";
import type { Caller, ListSandboxesInput, Page, UpdateSandboxInput } from "./services.ts";

export async function list(
  deps: Deps,
  caller: Caller,
  input: ListSandboxesInput,
): Promise<Page<SandboxSummary>> {
  const { statuses, metadata, limit, cursor } = input;
  return listSandboxes(deps.db, caller.teamId, { statuses, metadata }, { limit, cursor });
}

/**
 * One sandbox as it is: its host is asked, since only the host knows the expiry
 * of an idle one and the disk that it uses. Where the host does not answer
 * quickly, what the row knows is the answer.
 */
export async function getSandbox(deps: Deps, caller: Caller, id: SandboxId): Promise<Sandbox> {
  const row = await findSandbox(deps.db, caller.teamId, id);
  if (!row) throw noSandbox();
  if ((row.status !== "running" && row.status !== "paused") || !row.hostId) return row;
  const host = await findHostEndpoint(deps.db, row.hostId);
  if (!host || host.status === "unreachable") return row;
  const agent = deps.pool.agent(host);
  try {
    const seen = await agent.getSandbox(id, AbortSignal.timeout(deps.options.lookMs));
    const settled = await settleSandbox(deps, agent, row, seen);
    if (settled.kind === "left-alone") return (await findSandbox(deps.db, caller.teamId, id)) ?? row;
    const now = settled.kind === "settled" ? settled.row : row;
    const { expiresAt, diskUsedBytes } = factsOf(seen);
    return isFinal(now.status)
      ? now
      : { ...now, expiresAt: expiresAt ?? undefined, diskUsedBytes: diskUsedBytes ?? now.diskUsedBytes };
  } catch (cause) {
    deps.log.debug({ err: cause, sandbox: id }, "a host did not answer about a sandbox");
    return row;
  }
}

export async function updateSandbox(
  deps: Deps,
  caller: Caller,
  id: SandboxId,
  input: UpdateSandboxInput,
): Promise<Sandbox> {
  const row = await findSandbox(deps.db, caller.teamId, id);
  if (!row) throw noSandbox();
  const expiresAt = isLifetimeChange(input) ? await changeLifetime(deps, row, input) : undefined;
  const changed = await changeSandbox(deps.db, caller.teamId, id, {
    ...input,
    ...(expiresAt !== undefined && { expiresAt }),
  });
  if (changed) return changed;
  const now = await findSandbox(deps.db, caller.teamId, id);
  throw wrongState(now?.status ?? row.status, "it is over");
}

function isLifetimeChange({ timeoutSec, onTimeout, timeoutMode }: UpdateSandboxInput): boolean {
  return timeoutSec !== undefined || onTimeout !== undefined || timeoutMode !== undefined;
}

/** Its host counts the time: it is told first, and says when it now ends. */
async function changeLifetime(
  { db, pool }: Deps,
  row: SandboxRecord,
  input: UpdateSandboxInput,
): Promise<Date | null> {
  if (row.status === "missing") throw silentHost();
  if (row.status !== "running" && row.status !== "paused") {
    throw wrongState(row.status, "its lifetime can be changed while it is running or paused");
  }
  const host = row.hostId && (await findHostEndpoint(db, row.hostId));
  if (!host || host.status === "unreachable") throw silentHost();
  try {
    const seen = await pool.agent(host).updateSandbox(row.id, {
      timeoutSec: input.timeoutSec ?? row.timeoutSec,
      onTimeout: input.onTimeout ?? row.onTimeout,
      timeoutMode: input.timeoutMode ?? row.timeoutMode,
    });
    return factsOf(seen).expiresAt ?? null;
  } catch (cause) {
    if (cause instanceof RookeryError && cause.code === "not_found") {
      throw wrongState(row.status, "its host does not have it any more");
    }
    throw cause;
  }
}
