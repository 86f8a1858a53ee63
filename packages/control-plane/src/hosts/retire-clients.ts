/**
 * Hosts that another replica revoked, deleted or saw register anew lose their
 * client here too: one look at the rows of those that have one.
 */
import { epochsOfHosts } from "../db/host-end.ts";
import type { HostDeps } from "./settle.ts";

export async function retireClients({ db, pool }: Pick<HostDeps, "db" | "pool">): Promise<void> {
  const clients = pool.epochs;
  const epochs = await epochsOfHosts(db, [...clients.keys()]);
  for (const [id, epoch] of clients) {
    const current = epochs.get(id) ?? Infinity;
    if (epoch < current) pool.retire(id, current);
  }
}
