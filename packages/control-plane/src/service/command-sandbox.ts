/**
 * Pause and resume: one shape. The row says that a host is at it, the host does
 * it, and the row becomes what the host says, also when the host failed: then it
 * is asked, and the row goes back with the reason shown. Where nobody answers,
 * the row stays as it is, for the sweep.
 */
import { RookeryError } from "@rookery/protocol/errors";
import { findHostEndpoint } from "../db/hosts.ts";
import { type SandboxRecord, findSandbox, moveSandbox } from "../db/sandboxes.ts";
import type { AgentOperation, AgentSandbox, HostAgent } from "../hosts/host-agent.ts";
import { type Settled, settleSandbox } from "../hosts/settle.ts";
import type { SandboxId } from "../model/ids.ts";
import { nextStatus } from "../model/sandbox-state.ts";
import type { SandboxStatus } from "../model/sandbox.ts";
import type { Deps } from "./deps.ts";
import { noSandbox, shownError, silentHost, wrongState } from "./errors.ts";
import { holdRow } from "./hold-row.ts";
import type { KnownHosts } from "./known-hosts.ts";
import { type Resumed, type Source, resumeElsewhere } from "./resume-elsewhere.ts";
import type { Caller } from "./services.ts";

interface SandboxCommand {
  event: "pause" | "resume";
  goal: SandboxStatus;
  /** For the caller whose sandbox is in another status. */
  wanted: string;
  limitMs: number;
  /** Before its host is told: another one may do it instead. */
  elsewhere?(row: SandboxRecord, source: Source): Promise<Resumed>;
  call(agent: HostAgent, operation: AgentOperation): Promise<AgentSandbox>;
}

export function pauseSandbox(deps: Deps, caller: Caller, id: SandboxId): Promise<SandboxRecord> {
  return commandSandbox(deps, caller, id, {
    event: "pause",
    goal: "paused",
    wanted: "only a running one can be paused",
    limitMs: deps.options.pauseMs,
    call: (agent, operation) => agent.pauseSandbox(operation),
  });
}

export function resumeSandbox(
  deps: Deps,
  knownHosts: KnownHosts,
  caller: Caller,
  id: SandboxId,
): Promise<SandboxRecord> {
  return commandSandbox(deps, caller, id, {
    event: "resume",
    goal: "running",
    wanted: "only a paused one can be resumed",
    limitMs: deps.options.resumeMs,
    elsewhere: (row, source) => resumeElsewhere(deps, knownHosts, row, source),
    call: (agent, operation) => agent.resumeSandbox(operation),
  });
}

async function commandSandbox(
  deps: Deps,
  caller: Caller,
  id: SandboxId,
  command: SandboxCommand,
): Promise<SandboxRecord> {
  const begun = await begin(deps, caller, id, command);
  const { agent } = begun;
  let { row } = begun;
  let settled: Settled;
  let isTold = false;
  try {
    const resumed = await command.elsewhere?.(row, begun);
    if (resumed?.kind === "moved") return resumed.row;
    row = resumed?.row ?? row;
    const operation = {
      sandboxId: id,
      generation: row.generation,
      deadline: new Date(deps.clock.now() + command.limitMs),
    };
    isTold = true;
    const seen = await holdRow(deps, row, () => command.call(agent, operation));
    settled = await settleSandbox(deps, agent, row, seen);
  } catch (cause) {
    const after = await settleFailed(deps, agent, row, cause);
    // The answer was lost, or somebody else's command did the same: it is as the caller wants it.
    if (after?.status === command.goal) return after;
    if (!after && isTold) await assertUnmoved(deps, caller, row);
    throw cause;
  }
  if (settled.kind === "settled" && settled.row.status === command.goal) return settled.row;
  await assertUnmoved(deps, caller, row);
  throw new RookeryError("host_error", "The host's answer does not fit what it was told.");
}

/** Whoever moved the row won; the caller hears how it stands. */
async function assertUnmoved({ db }: Deps, { teamId }: Caller, row: SandboxRecord): Promise<void> {
  const now = await findSandbox(db, teamId, row.id);
  if (now?.generation !== row.generation)
    throw wrongState(now?.status ?? row.status, "it was changed meanwhile");
}

/** Moves the row; whoever else moved it in between is looked at anew. */
async function begin(
  { db, pool, options }: Deps,
  caller: Caller,
  id: SandboxId,
  command: SandboxCommand,
): Promise<Source & { row: SandboxRecord }> {
  for (;;) {
    const row = await findSandbox(db, caller.teamId, id);
    if (!row) throw noSandbox();
    if (nextStatus(row.status, command.event) === undefined) throw wrongState(row.status, command.wanted);
    const host = row.hostId && (await findHostEndpoint(db, row.hostId));
    if (!host || host.status === "unreachable") throw silentHost();
    const moved = await moveSandbox(db, row, command.event, { deadlineMs: options.leaseMs });
    if (moved) return { row: moved, host, agent: pool.agent(host) };
  }
}

async function settleFailed(
  deps: Deps,
  agent: HostAgent,
  row: SandboxRecord,
  cause: unknown,
): Promise<SandboxRecord | undefined> {
  try {
    const seen = await agent.getSandbox(row.id);
    const settled = await settleSandbox(deps, agent, row, seen, shownError(cause));
    return settled.kind === "settled" ? settled.row : undefined;
  } catch (unsettled) {
    if (!(unsettled instanceof RookeryError)) throw unsettled;
    deps.log.warn({ err: unsettled, sandbox: row.id }, "what became of a command is not known yet");
    return undefined;
  }
}
