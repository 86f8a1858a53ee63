/**
 * What an operator does to a host: relabel it, drain it, cut it off, delete it.
 *
 * A member does so to its team's own hosts, a platform key to all.
 */
import { RookeryError } from "@rookery/protocol/errors";
import {
  type HostChange,
  type HostContents,
  changeHost as changeRow,
  contentsOfHost,
  deleteHost as deleteRow,
  revokeHost as revokeRow,
} from "../db/host-end.ts";
import { endHost } from "../hosts/end-host.ts";
import type { HostId } from "../model/ids.ts";
import type { Deps } from "./deps.ts";
import { getHost, noHost, scopeOf } from "./hosts.ts";
import type { Caller, Host } from "./services.ts";

/** Of each kind, in a preview or a refusal. */
const LISTED = 100;

export async function changeHost(deps: Deps, caller: Caller, id: HostId, change: HostChange): Promise<Host> {
  if (!(await changeRow(deps.db, scopeOf(caller), id, change))) throw noHost();
  if (change.draining !== undefined) {
    deps.log.info({ host: id }, change.draining ? "a host drains" : "a host takes sandboxes again");
  }
  return getHost(deps, caller, id);
}

/** From here on neither its tokens nor our connection to it are good. Again: the same. */
export async function revokeHost(deps: Deps, caller: Caller, id: HostId): Promise<Host> {
  const revoked = await revokeRow(deps.db, scopeOf(caller), id);
  if (!revoked) throw noHost();
  deps.pool.retire(id, revoked.epoch);
  deps.log.warn({ host: id, missing: revoked.missing }, "a host's credentials were revoked");
  return getHost(deps, caller, id);
}

export async function previewHostDeletion(deps: Deps, caller: Caller, id: HostId): Promise<HostContents> {
  await getHost(deps, caller, id);
  return contentsOfHost(deps.db, id, LISTED);
}

/**
 * Its rows are final and its credentials refused when this returns, whatever
 * the host answers; where it can be reached, its sandboxes are gone too.
 */
export async function deleteHost(
  deps: Deps,
  caller: Caller,
  id: HostId,
  { force }: { force: boolean },
): Promise<void> {
  const done = await deleteRow(deps.db, scopeOf(caller), id, { force, limit: LISTED });
  if (done.kind === "unknown") throw noHost();
  if (done.kind === "occupied") throw occupied(done.contents);
  deps.log.warn({ host: id, stopped: done.stopped.length }, "a host was deleted");
  try {
    if (done.endpoint) await endHost(deps, done.endpoint, deps.options.destroyMs);
  } finally {
    deps.pool.retire(id, Infinity);
  }
}

function occupied({ sandboxes, sandboxCount, snapshots, snapshotCount }: HostContents): RookeryError {
  const what =
    sandboxCount > 0
      ? `still has ${sandboxCount} sandboxes`
      : `has ${snapshotCount} snapshots that are nowhere else`;
  return new RookeryError("host_has_sandboxes", `The host ${what}; \`force=true\` ends all that is on it.`, {
    details: {
      sandboxes: sandboxes.map(({ id, teamId, status }) => ({ id, team_id: teamId, status })),
      sandbox_count: sandboxCount,
      snapshots: snapshots.map(({ id, teamId, name }) => ({ id, team_id: teamId, name })),
      snapshot_count: snapshotCount,
    },
  });
}
