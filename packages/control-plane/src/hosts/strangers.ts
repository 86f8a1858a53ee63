/**
 * Strangers: sandboxes that a host has and no row knows. The database may be an
 * older backup, so they are not destroyed at once: their guests are stopped in
 * memory, which costs no CPU, and kept for a while. Rows that come back
 * meanwhile find them as they were.
 *
 * Invariants: since when one is a stranger, its host remembers, so neither
 * another replica nor anyone's restart begins anew; and when very many are
 * strangers at once, it is we who must be wrong, and nothing is touched.
 */
import pLimit from "p-limit";
import { recordStrangers } from "../db/host-strangers.ts";
import { findSandboxes } from "../db/sandboxes.ts";
import type { HostRecord } from "../db/hosts.ts";
import type { AgentPhase, AgentSandbox, HostAgent } from "./host-agent.ts";
import { type HostDeps, endSandbox } from "./settle.ts";

/** More than this many, and more than this share of a host's sandboxes. */
const MANY = 5;
const LARGE_SHARE = 1 / 5;
/** Named in the log. */
const NAMED = 20;
const PARALLEL = 8;
/** Phases in which a host stands still, and can be told to go on doing so. */
const STANDS_STILL: ReadonlySet<AgentPhase> = new Set(["running", "paused", "failed"]);

export const STRANGER_KEEP_MS = 24 * 3_600_000;

/** `total`: all that the host has, strangers or not. */
export async function treatStrangers(
  deps: HostDeps,
  host: HostRecord,
  agent: HostAgent,
  seen: { strangers: readonly AgentSandbox[]; total: number; keepMs: number },
  signal: AbortSignal,
): Promise<void> {
  const { strangers, total, keepMs } = seen;
  const count = strangers.length;
  const untouched = count > MANY && count > total * LARGE_SHARE;
  if (count !== host.strangers || untouched !== host.strangersUntouched) {
    await recordStrangers(deps.db, host.id, { count, untouched });
  }
  if (count === 0) return;
  const facts = { host: host.id, sandboxes: strangers.slice(0, NAMED).map(({ id }) => id), count, total };
  if (untouched) {
    deps.log.error(
      facts,
      "most unlikely many sandboxes of a host are known to no row; nothing is touched. Is this the right database?",
    );
    return;
  }
  deps.log.error(
    facts,
    "a host has sandboxes that no row knows; they are stopped and kept for a while. Was an older backup restored?",
  );
  const limit = pLimit(PARALLEL);
  await Promise.all(
    strangers.map((stranger) =>
      limit(async () => {
        if (!signal.aborted) await treat(deps, agent, stranger, keepMs, signal);
      }),
    ),
  );
}

async function treat(
  deps: HostDeps,
  agent: HostAgent,
  stranger: AgentSandbox,
  keepMs: number,
  signal: AbortSignal,
): Promise<void> {
  const { id, generation, phase, strangerForMs } = stranger;
  try {
    if (strangerForMs === undefined) {
      if (STANDS_STILL.has(phase)) await agent.freezeSandbox(id, signal);
      return;
    }
    if (strangerForMs < keepMs) return;
    // What can't be taken back is decided by what is so now.
    if ((await findSandboxes(deps.db, [id])).length > 0) return;
    deps.log.error({ sandbox: id, strangerForMs }, "destroying a sandbox that no row has known for so long");
    await endSandbox(deps, agent, { id, generation });
  } catch (cause) {
    if (!signal.aborted) deps.log.warn({ err: cause, sandbox: id }, "a stranger could not be dealt with yet");
  }
}

/**
 * What the host has of a row that there is: one that was taken for a stranger
 * goes on first. Until that has happened, nothing is to be concluded from it.
 */
export async function welcomeBack(
  deps: HostDeps,
  agent: HostAgent,
  seen: AgentSandbox | undefined,
  signal: AbortSignal,
): Promise<AgentSandbox | undefined | "not-yet"> {
  if (seen?.strangerForMs === undefined) return seen;
  const { id, strangerForMs } = seen;
  deps.log.warn({ sandbox: id, strangerForMs }, "a sandbox that was taken for a stranger has its row again");
  try {
    return await agent.thawSandbox(id, signal);
  } catch (cause) {
    if (!signal.aborted) deps.log.warn({ err: cause, sandbox: id }, "it could not be let go on yet");
    return "not-yet";
  }
}
