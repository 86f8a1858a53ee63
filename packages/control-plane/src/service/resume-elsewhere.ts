/**
 * Resumes a paused sandbox on another host, since its own drains (ADR 21).
 *
 * Its host sends it to the object store as a snapshot that nobody else sees; then
 * one compare-and-set gives the row to another host, which starts the same sandbox
 * of it. The former host keeps its paused copy, and the row that host's name
 * (`movingFrom`), until the sandbox was seen running. Whoever settles the row if
 * we don't live to do so, takes it back to that copy unless it runs.
 */
import type { ErrorCode } from "@rookery/protocol/errors";
import { RookeryError } from "@rookery/protocol/errors";
import type { HostRecord } from "../db/hosts.ts";
import { type SandboxRecord, moveSandbox } from "../db/sandboxes.ts";
import { recordSnapshotCopy, recordSnapshotStored } from "../db/snapshot-copies.ts";
import { insertSnapshot } from "../db/snapshots.ts";
import type { HostAgent } from "../hosts/host-agent.ts";
import type { SnapshotPlaces } from "../hosts/scheduler.ts";
import { agentOf, endSandbox, releaseVm, settleSandbox } from "../hosts/settle.ts";
import type { HostId, SnapshotId } from "../model/ids.ts";
import { operationOf, specOf } from "./create-sandbox.ts";
import type { Deps } from "./deps.ts";
import { shownError, wrongState } from "./errors.ts";
import { holdRow } from "./hold-row.ts";
import type { KnownHosts } from "./known-hosts.ts";
import { discardUnfinished } from "./snapshots.ts";

/** Where it is paused. */
export interface Source {
  host: Pick<HostRecord, "id" | "draining" | "storeId" | "snapshotCompat">;
  agent: HostAgent;
}

export type Resumed =
  | { kind: "moved"; row: SandboxRecord }
  /** No other host takes it: its own may go on with the row. */
  | { kind: "stays"; row: SandboxRecord };

/** Hosts that are asked, one after the other. */
const MAX_HOSTS = 3;
/** Between two looks whether the store has it. */
const LOOK_MS = 200;

/** `row` is `resuming` on its own host, which has not been told so yet. */
export async function resumeElsewhere(
  deps: Deps,
  knownHosts: KnownHosts,
  row: SandboxRecord,
  source: Source,
): Promise<Resumed> {
  const { snapshotCompat: compat, storeId } = source.host;
  if (!source.host.draining || storeId === undefined) return { kind: "stays", row };
  const known = await knownHosts.readAnew(row.teamId);
  if (!pickHost(deps, row, known, { hostIds: [], compat, storeId })) return { kind: "stays", row };
  const id = deps.ids.snapshot();
  try {
    const startedMs = deps.clock.now();
    const sent = await holdRow(deps, row, () => send(deps, row, source, id));
    if (!sent) return { kind: "stays", row };
    const sentMs = deps.clock.now();
    const resumed = await resumeOnAny(deps, knownHosts, row, { from: source.host.id, id, places: sent });
    if (resumed.kind === "moved") {
      await releaseVm(deps, source.agent, resumed.row);
      const ms = { send: sentMs - startedMs, start: deps.clock.now() - sentMs };
      const facts = { sandbox: row.id, from: source.host.id, to: resumed.row.hostId, ms };
      deps.log.info(facts, "a sandbox was resumed on another host, since its own drains");
    }
    return resumed;
  } finally {
    await discardUnfinished(deps, id);
  }
}

/** Undefined: it can't be sent, and its host has it as before. Throws when its host does not answer. */
async function send(
  deps: Deps,
  row: SandboxRecord,
  { host, agent }: Source,
  id: SnapshotId,
): Promise<SnapshotPlaces | undefined> {
  const { db, clock, options } = deps;
  const { vcpus, memoryMb, diskMb, teamId } = row;
  const limitMs = options.snapshotMs;
  // It stays `creating`: nobody finds it, and if we die it is swept.
  const deadlineMs = limitMs + MAX_HOSTS * options.createMs + options.leaseMs;
  const shape = { vcpus, memoryMb, diskMb };
  const isInserted = await insertSnapshot(db, {
    id,
    teamId,
    name: id,
    hostId: host.id,
    ...shape,
    deadlineMs,
  });
  if (!isInserted) return undefined;
  const untilMs = clock.now() + limitMs;
  try {
    const operation = { sandboxId: row.id, generation: row.generation, deadline: new Date(untilMs) };
    const { compat } = await agent.createSnapshot(operation, id, teamId);
    const storeId = await untilStored(deps, agent, id, untilMs);
    await recordSnapshotStored(db, id, storeId);
    return { hostIds: [], compat, storeId };
  } catch (cause) {
    if (!(cause instanceof RookeryError) || isUnknown(cause.code)) throw cause;
    deps.log.warn({ err: cause, sandbox: row.id, host: host.id }, "a sandbox can't leave its draining host");
    return undefined;
  }
}

async function untilStored(
  { clock }: Deps,
  agent: HostAgent,
  id: SnapshotId,
  untilMs: number,
): Promise<string> {
  const limit = AbortSignal.timeout(Math.max(untilMs - clock.now(), 0));
  for (;;) {
    const [stored] = await agent.storedSnapshots([id], limit);
    if (stored?.id === id) return stored.storeId;
    if (clock.now() >= untilMs)
      throw new RookeryError("unavailable", "The object store did not take it in time.");
    await clock.sleep(LOOK_MS, limit);
  }
}

interface Move {
  from: HostId;
  id: SnapshotId;
  places: SnapshotPlaces;
}

async function resumeOnAny(
  deps: Deps,
  knownHosts: KnownHosts,
  row: SandboxRecord,
  move: Move,
): Promise<Resumed> {
  const passedOver = new Set([move.from]);
  let at = row;
  let refusal = new RookeryError("no_capacity", "No other host can take this sandbox now.");
  while (passedOver.size <= MAX_HOSTS) {
    const hosts = await knownHosts.readAnew(row.teamId);
    const fresh = hosts.filter(({ id }) => !passedOver.has(id));
    const host = pickHost(deps, row, fresh, move.places);
    if (!host) break;
    passedOver.add(host.id);
    const deadlineMs = deps.options.leaseMs;
    const moved = await moveSandbox(deps.db, at, "moveOn", {
      ...{ hostId: host.id, movingFrom: move.from, deadlineMs },
    });
    // That host takes none any more, or the row was moved: the next one tells.
    if (!moved) continue;
    at = moved;
    const outcome = await startOn(deps, host, at, move);
    if (outcome instanceof RookeryError) refusal = outcome;
    else return { kind: "moved", row: outcome };
  }
  if (at === row) return { kind: "stays", row };
  deps.log.warn({ err: refusal, sandbox: row.id }, "no other host resumed a sandbox: its own is told to");
  const back = await moveSandbox(deps.db, at, "moveBack", { hostId: move.from, error: shownError(refusal) });
  const deadlineMs = deps.options.leaseMs;
  const again = back && (await moveSandbox(deps.db, back, "resume", { deadlineMs }));
  if (!again) throw wrongState((back ?? at).status, "it was changed meanwhile");
  return { kind: "stays", row: again };
}

/** The row where it runs, or why it does not and never will there. Throws when that is not known: the sweep settles it. */
async function startOn(
  deps: Deps,
  host: HostRecord,
  row: SandboxRecord,
  { id }: Move,
): Promise<SandboxRecord | RookeryError> {
  const agent = agentOf(deps.pool, host);
  // Before the host may fetch it, so that a deletion finds all that have it.
  if (!agent || !(await recordSnapshotCopy(deps.db, id, host.id, "creating")))
    return new RookeryError("unavailable", "What was to be moved is gone.");
  let seen;
  try {
    const spec = specOf(deps, row, { name: row.template, snapshot: { id } });
    seen = await holdRow(deps, row, () => agent.createSandbox(operationOf(deps, row), spec));
  } catch (cause) {
    if (!(cause instanceof RookeryError)) throw cause;
    // It may have been made, or be made by a command that is still on its way.
    if (isUnknown(cause.code)) await endSandbox(deps, agent, row);
    return cause;
  }
  const settled = await settleSandbox(deps, agent, row, seen);
  if (settled.kind === "settled" && settled.row.status === "running") return settled.row;
  throw wrongState(row.status, "it was changed meanwhile");
}

function pickHost(
  { scheduler }: Deps,
  { memoryMb, diskMb }: SandboxRecord,
  hosts: readonly HostRecord[],
  snapshot: SnapshotPlaces,
): HostRecord | undefined {
  return scheduler.pick({ memoryMb, diskMb, snapshot }, hosts);
}

/** Nobody knows whether it happened. */
const isUnknown = (code: ErrorCode): boolean => code === "host_unreachable" || code === "timeout";
