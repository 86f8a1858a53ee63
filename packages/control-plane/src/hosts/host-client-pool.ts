/**
 * Clients of hosts, one per host, opened at its first use. A host that
 * registered anew, perhaps at another address or with another certificate, has
 * a higher epoch and gets a new client; one that was revoked or deleted loses
 * its own.
 *
 * Invariant: a client never goes back to an older epoch, nor to one that was
 * retired, however late the question that brings it.
 */
import { RookeryError } from "@rookery/protocol/errors";
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
  /** Epochs below which a host is none any more: a number for each that was revoked or deleted. */
  readonly #retired = new Map<HostId, number>();

  constructor(open: OpenClient) {
    this.#open = open;
  }

  agent(endpoint: HostEndpoint): HostAgent {
    const known = this.#entries.get(endpoint.id);
    if (known && known.epoch >= endpoint.epoch) return known.agent;
    if (endpoint.epoch < (this.#retired.get(endpoint.id) ?? 0)) {
      throw new RookeryError("host_unreachable", "The sandbox's host is not there any more.");
    }
    known?.close();
    const entry = { epoch: endpoint.epoch, ...this.#open(endpoint) };
    this.#entries.set(endpoint.id, entry);
    return entry.agent;
  }

  /** Its connection breaks, and none is opened to an epoch below `epoch`: Infinity when it was deleted. */
  retire(id: HostId, epoch: number): void {
    this.#retired.set(id, Math.max(epoch, this.#retired.get(id) ?? 0));
    const known = this.#entries.get(id);
    if (!known || known.epoch >= epoch) return;
    known.close();
    this.#entries.delete(id);
  }

  /** Those that have a client, and of which epoch it is. */
  get epochs(): ReadonlyMap<HostId, number> {
    return new Map([...this.#entries].map(([id, { epoch }]) => [id, epoch]));
  }

  close(): void {
    for (const entry of this.#entries.values()) entry.close();
    this.#entries.clear();
  }
}
