/**
 * Deletes a snapshot wherever it lies. Its row is `deleting`, so that nobody
 * uses it any more; hosts that are silent are told at their next contact.
 */
import { condemnedCopiesOfHost, condemnSnapshotCopies, removeSnapshotCopy } from "../db/snapshot-copies.ts";
import { removeSnapshot } from "../db/snapshots.ts";
import type { HostId, SnapshotId } from "../model/ids.ts";
import type { HostAgent } from "./host-agent.ts";
import type { HostDeps } from "./settle.ts";

/** Told in one round of a host. */
const AT_ONCE = 100;

/** Throws when a host that is online did not do it: the row stays, and is swept. */
export async function forgetSnapshot({ db, pool }: HostDeps, id: SnapshotId): Promise<void> {
  const online = await condemnSnapshotCopies(db, id);
  const told = await Promise.allSettled(
    online.map(async (host) => {
      await pool.agent(host).deleteSnapshot(id);
      await removeSnapshotCopy(db, id, host.id);
    }),
  );
  const failed = told.find((outcome) => outcome.status === "rejected");
  if (failed) throw failed.reason;
  await removeSnapshot(db, id);
}

/** What was deleted while this host was silent. */
export async function forgetCondemned({ db }: HostDeps, hostId: HostId, agent: HostAgent): Promise<void> {
  for (const id of await condemnedCopiesOfHost(db, hostId, AT_ONCE)) {
    await agent.deleteSnapshot(id);
    await removeSnapshotCopy(db, id, hostId);
  }
}
