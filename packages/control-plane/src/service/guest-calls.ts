/**
 * Calls into a running guest: exec, files, ping. The hot path: one indexed query
 * and one call to the host. When the host says that the sandbox does not run,
 * our row was behind: it is settled and the caller told what is true.
 */
import { RookeryError } from "@rookery/protocol/errors";
import { findSandbox, findSandboxTarget } from "../db/sandboxes.ts";
import type { HostAgent } from "../hosts/host-agent.ts";
import { settleSandbox } from "../hosts/settle.ts";
import type { SandboxId } from "../model/ids.ts";
import type { Deps } from "./deps.ts";
import { noSandbox, silentHost, wrongState } from "./errors.ts";
import type { Caller, ExecInput, ExecResult } from "./services.ts";

const WANTED = "it has to be running";

export function exec(
  deps: Deps,
  caller: Caller,
  id: SandboxId,
  input: ExecInput,
  signal: AbortSignal,
): Promise<ExecResult> {
  const { timeoutSec, ...command } = input;
  return withGuest(deps, caller, id, (agent) =>
    agent.exec(id, { ...command, timeoutMs: Math.ceil(timeoutSec * 1000) }, signal),
  );
}

export function writeFile(
  deps: Deps,
  caller: Caller,
  id: SandboxId,
  path: string,
  content: AsyncIterable<Uint8Array>,
  signal: AbortSignal,
): Promise<void> {
  return withGuest(deps, caller, id, (agent) => agent.writeFile(id, path, content, signal));
}

export function readFile(
  deps: Deps,
  caller: Caller,
  id: SandboxId,
  path: string,
  signal: AbortSignal,
): Promise<{ sizeBytes?: number | undefined; content: AsyncIterable<Uint8Array> }> {
  return withGuest(deps, caller, id, (agent) => agent.readFile(id, path, signal));
}

export async function pingSandbox(deps: Deps, caller: Caller, id: SandboxId): Promise<void> {
  await withGuest(deps, caller, id, (agent) => agent.pingSandbox(id));
}

async function withGuest<T>(
  deps: Deps,
  caller: Caller,
  id: SandboxId,
  call: (agent: HostAgent) => Promise<T>,
): Promise<T> {
  const target = await findSandboxTarget(deps.db, caller.teamId, id);
  if (!target) throw noSandbox();
  if (target.status === "missing") throw silentHost();
  if (target.status !== "running" || !target.host) throw wrongState(target.status, WANTED);
  const agent = deps.pool.agent(target.host);
  try {
    return await call(agent);
  } catch (cause) {
    if (cause instanceof RookeryError && (cause.code === "wrong_state" || cause.code === "not_found")) {
      throw await explain(deps, caller, id, agent, cause);
    }
    throw cause;
  }
}

async function explain(
  deps: Deps,
  caller: Caller,
  id: SandboxId,
  agent: HostAgent,
  cause: RookeryError,
): Promise<RookeryError> {
  const row = await findSandbox(deps.db, caller.teamId, id);
  if (!row) return noSandbox();
  if (row.status !== "running") return wrongState(row.status, WANTED);
  const settled = await settleSandbox(deps, agent, row, await agent.getSandbox(id));
  return settled.kind === "settled" && settled.row.status !== "running"
    ? wrongState(settled.row.status, WANTED)
    : cause;
}
