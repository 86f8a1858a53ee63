/**
 * Snapshots: made by the host of their sandbox, kept there and in its object
 * store if it has one, used by name.
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
  extendSnapshotDeadline,
  findSnapshot,
  insertSnapshot,
  markSnapshotDeleting,
} from "../db/snapshots.ts";
import { findPlatformTemplate } from "../db/templates.ts";
import { forgetSnapshot } from "../hosts/forget-snapshot.ts";
import type { HostAgent } from "../hosts/host-agent.ts";
import type { SandboxId, SnapshotId } from "../model/ids.ts";
import type { Deps } from "./deps.ts";
import { noSandbox, silentHost, wrongState } from "./errors.ts";
import { ClaimLost } from "./idempotent.ts";
import type { Caller, HeldKey, Snapshot } from "./services.ts";

export interface SnapshotInput {
  sandboxId: SandboxId;
  name: string;
  overwrite: boolean;
}

const NAME = /^[a-z0-9][a-z0-9._-]{0,62}$/;

export async function createSnapshot(
  deps: Deps,
  caller: Caller,
  input: SnapshotInput,
  held?: HeldKey<Snapshot>,
): Promise<Snapshot> {
  const { db, options } = deps;
  const before = await madeBefore(deps, caller, held);
  if (!before) await assertNameIsFree(deps, caller, input);
  const { row, agent } = await findSource(deps, caller, input.sandboxId);
  const id = before?.hostId === row.hostId ? before.id : await insert(deps, caller, { input, row, held });
  try {
    // The source's status stays, so its generation does too: the snapshot's id tells repetitions.
    const operation = {
      sandboxId: row.id,
      generation: row.commandGeneration,
      deadline: new Date(deps.clock.now() + options.snapshotMs),
    };
    const made = await agent.createSnapshot(operation, id, caller.teamId);
    return await db.transaction().execute(async (tx) => {
      const done = await completeSnapshot(tx, id, made, { overwrite: input.overwrite });
      if (!done) throw new RookeryError("timeout", "The snapshot took too long.");
      await held?.complete(tx, id, done);
      return done;
    });
  } catch (cause) {
    if (!(cause instanceof ClaimLost)) await discardUnfinished(deps, id);
    throw violatedConstraint(cause) === SNAPSHOT_NAME_CONSTRAINT ? nameTaken(input.name) : cause;
  }
}

/** One that an earlier call under this key left unfinished when its replica died: its host is told once more. */
async function madeBefore(
  { db, options }: Deps,
  { teamId }: Caller,
  held: HeldKey<Snapshot> | undefined,
): Promise<SnapshotRecord | undefined> {
  if (held?.resourceId === undefined) return undefined;
  const deadlineMs = options.snapshotMs + options.leaseMs;
  // oxlint-disable-next-line typescript/no-unsafe-type-assertion -- what this same use case bound the key to
  return extendSnapshotDeadline(db, teamId, held.resourceId as SnapshotId, deadlineMs);
}

async function insert(
  { db, ids, options }: Deps,
  { teamId }: Caller,
  { input, row, held }: { input: SnapshotInput; row: Source; held: HeldKey<Snapshot> | undefined },
): Promise<SnapshotId> {
  const id = ids.snapshot();
  await db.transaction().execute(async (tx) => {
    const isInserted = await insertSnapshot(tx, {
      id,
      teamId,
      name: input.name,
      hostId: row.hostId,
      vcpus: row.vcpus,
      memoryMb: row.memoryMb,
      diskMb: row.diskMb,
      deadlineMs: options.snapshotMs + options.leaseMs,
    });
    if (!isInserted) throw silentHost();
    await held?.bind(tx, id);
  });
  return id;
}

/** From here on nobody can use it; when its host is silent, the rest comes later. */
export async function deleteSnapshot(deps: Deps, caller: Caller, name: string): Promise<void> {
  const snapshot = await findSnapshot(deps.db, caller.teamId, name);
  if (!snapshot) throw new RookeryError("not_found", "There is no such snapshot.");
  await markSnapshotDeleting(deps.db, snapshot.id, deps.options.leaseMs, "ready");
  await forget(deps, snapshot.id);
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

/** What another call has finished meanwhile is that call's. */
export async function discardUnfinished(deps: Deps, id: SnapshotId): Promise<void> {
  if (await markSnapshotDeleting(deps.db, id, deps.options.leaseMs, "creating")) await forget(deps, id);
}

async function forget(deps: Deps, id: SnapshotId): Promise<void> {
  try {
    await forgetSnapshot(deps, id);
  } catch (cause) {
    deps.log.warn({ err: cause, snapshot: id }, "a snapshot could not be deleted on every host yet");
  }
}

function nameTaken(name: string): RookeryError {
  return new RookeryError("already_exists", `There is a template or snapshot named ${name} already.`, {
    details: { field: "name" },
  });
}
