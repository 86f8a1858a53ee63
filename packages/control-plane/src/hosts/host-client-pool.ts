/**
 * Clients of hosts, one per host, opened at its first use. A host that
 * registered anew, perhaps at another address or with another certificate, has
 * a higher epoch and gets a new client; one that is deleted loses its own.
 *
 * Invariant: a client never goes back to an older epoch, however late the
 * question that brings it.
 */
import type { HostEndpoint } from "../db/hosts.ts";
import type { HostId } from "../model/ids.ts";
import type { HostAgent } from "./host-agent.ts";

/** How a client is opened: over the network, or to a fake in tests. */
export type OpenClient = (endpoint: HostEndpoint) => { agent: HostAgent; close(): void };

interface Entry {
  epoch: number;
  agent: HostAgent;
  close(): void;
}

export class HostClientPool {
  readonly #open: OpenClient;
  readonly #entries = new Map<HostId, Entry>();

  constructor(open: OpenClient) {
    this.#open = open;
  }

  agent(endpoint: HostEndpoint): HostAgent {
    const known = this.#entries.get(endpoint.id);
    if (known && known.epoch >= endpoint.epoch) return known.agent;
    known?.close();
    const entry = { epoch: endpoint.epoch, ...this.#open(endpoint) };
    this.#entries.set(endpoint.id, entry);
    return entry.agent;
  }

  evict(id: HostId): void {
    this.#entries.get(id)?.close();
    this.#entries.delete(id);
  }

  close(): void {
    for (const id of [...this.#entries.keys()]) this.evict(id);
  }
}
