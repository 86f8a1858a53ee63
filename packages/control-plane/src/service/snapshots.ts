/**
 * Snapshots: made by the host of their sandbox, kept there, used by name.
 *
 * A row `creating` comes first, so that what a crash leaves on a host has a row
 * that leads to it: such rows are swept, and their snapshots deleted.
 */
import { RookeryError } from "@rookery/protocol/errors";
import { violatedConstraint } from "../db/database.ts";
import { findHostEndpoint } from "../db/hosts.ts";
import { type SandboxRecord, findSandbox } from "../db/sandboxes.ts";
import {
  SNAPSHOT_NAME_CONSTRAINT,
  type SnapshotRecord,
  completeSnapshot,
  findSnapshot,
  insertSnapshot,
  markSnapshotDeleting,
  removeSnapshot,
} from "../db/snapshots.ts";
import { findPlatformTemplate } from "../db/templates.ts";
import type { HostAgent } from "../hosts/host-agent.ts";
import type { SandboxId, SnapshotId } from "../model/ids.ts";
import type { Deps } from "./deps.ts";
import { noSandbox, silentHost, wrongState } from "./errors.ts";
import type { Caller, Snapshot } from "./services.ts";

export interface SnapshotInput {
  sandboxId: SandboxId;
  name: string;
  overwrite: boolean;
}

const NAME = /^[a-z0-9][a-z0-9._-]{0,62}$/;

export async function createSnapshot(deps: Deps, caller: Caller, input: SnapshotInput): Promise<Snapshot> {
  const { db, options } = deps;
  await assertNameIsFree(deps, caller, input);
  const { row, agent } = await findSource(deps, caller, input.sandboxId);
  const id = deps.ids.snapshot();
  await insertSnapshot(db, {
    id,
    teamId: caller.teamId,
    name: input.name,
    hostId: row.hostId,
    vcpus: row.vcpus,
    memoryMb: row.memoryMb,
    diskMb: row.diskMb,
    deadlineMs: options.snapshotMs + options.leaseMs,
  });
  try {
    // The source's status stays, so its generation does too: the snapshot's id tells repetitions.
    const operation = {
      sandboxId: row.id,
      generation: row.commandGeneration,
      deadline: new Date(deps.clock.now() + options.snapshotMs),
    };
    const made = await agent.createSnapshot(operation, id, caller.teamId);
    const done = await db
      .transaction()
      .execute((tx) => completeSnapshot(tx, id, made, { overwrite: input.overwrite }));
    if (!done) throw new RookeryError("timeout", "The snapshot took too long.");
    return done;
  } catch (cause) {
    await discard(deps, id, agent);
    throw violatedConstraint(cause) === SNAPSHOT_NAME_CONSTRAINT ? nameTaken(input.name) : cause;
  }
}

/** From here on nobody can use it; when its host is silent, the rest comes later. */
export async function deleteSnapshot(deps: Deps, caller: Caller, name: string): Promise<void> {
  const snapshot = await findSnapshot(deps.db, caller.teamId, name);
  if (!snapshot) throw new RookeryError("not_found", "There is no such snapshot.");
  const host = await findHostEndpoint(deps.db, snapshot.hostId);
  await discard(deps, snapshot.id, host && deps.pool.agent(host));
}

async function assertNameIsFree({ db }: Deps, { teamId }: Caller, input: SnapshotInput): Promise<void> {
  if (!NAME.test(input.name)) {
    const reason = "must be 1 to 63 of a-z, 0-9, `.`, `_`, `-`, beginning with a letter or digit";
    throw new RookeryError("invalid_request", `name ${reason}`, { details: { field: "name", reason } });
  }
  if (await findPlatformTemplate(db, input.name)) throw nameTaken(input.name);
  const present = input.overwrite ? undefined : await findSnapshot(db, teamId, input.name);
  if (present?.name === input.name) throw nameTaken(input.name);
}

type Source = SandboxRecord & Pick<SnapshotRecord, "hostId">;

async function findSource(
  { db, pool }: Deps,
  { teamId }: Caller,
  id: SandboxId,
): Promise<{ row: Source; agent: HostAgent }> {
  const row = await findSandbox(db, teamId, id);
  if (!row) throw noSandbox();
  const { hostId } = row;
  if ((row.status !== "running" && row.status !== "paused") || !hostId) {
    throw wrongState(row.status, "a snapshot is made of a running or a paused one");
  }
  const host = await findHostEndpoint(db, hostId);
  if (!host || host.status === "unreachable") throw silentHost();
  return { row: { ...row, hostId }, agent: pool.agent(host) };
}

async function discard(deps: Deps, id: SnapshotId, agent: HostAgent | undefined): Promise<void> {
  await markSnapshotDeleting(deps.db, id, deps.options.leaseMs);
  try {
    await agent?.deleteSnapshot(id);
    if (agent) await removeSnapshot(deps.db, id);
  } catch (cause) {
    deps.log.warn({ err: cause, snapshot: id }, "a snapshot could not be deleted on its host yet");
  }
}

function nameTaken(name: string): RookeryError {
  return new RookeryError("already_exists", `There is a template or snapshot named ${name} already.`, {
    details: { field: "name" },
  });
}
