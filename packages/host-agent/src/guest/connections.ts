/**
 * Keep-alive connections to guests, one pool per address of an envd.
 *
 * An address is used again by later VMs, so a pool belongs to one VM: `reset`
 * (before the first call after a restore) and `release` (when the VM is gone)
 * end it. What nobody uses for a while goes by itself.
 */
import { setImmediate as nextTurn } from "node:timers/promises";
import { Pool } from "undici";
import { RookeryError } from "@rookery/protocol/errors";
import { connectRacing } from "./connect-racing.ts";
import type { GuestLimits } from "./limits.ts";

export interface EnvdAddress {
  host: string;
  port: number;
}

interface Entry {
  pool: Pool;
  calls: number;
  idle: NodeJS.Timeout | undefined;
  /** Until the connection of the call that just ended counts as free. */
  settling: Promise<void> | undefined;
}

export class GuestConnections {
  readonly #limits: GuestLimits;
  readonly #entries = new Map<string, Entry>();
  #closed = false;

  constructor(limits: GuestLimits) {
    this.#limits = limits;
  }

  /** Runs `use` with the pool of `address`, within the bound of calls at once. */
  async use<T>(address: EnvdAddress, use: (pool: Pool) => Promise<T>): Promise<T> {
    const entry = await this.acquire(address);
    try {
      return await use(entry.pool);
    } finally {
      entry.release();
    }
  }

  /** Like `use`, for callers whose work is a stream: `release` must be called once. */
  async acquire(address: EnvdAddress): Promise<{ pool: Pool; release: () => void }> {
    await this.#entries.get(keyOf(address))?.settling;
    if (this.#closed) throw new RookeryError("unavailable", "The host agent is stopping");
    const key = keyOf(address);
    const entry = this.#entries.get(key) ?? this.#open(key, address);
    if (entry.calls >= this.#limits.calls) {
      throw new RookeryError("rate_limited", `More than ${this.#limits.calls} calls at once to one sandbox`);
    }
    clearTimeout(entry.idle);
    entry.calls += 1;
    let released = false;
    const release = (): void => {
      if (released) return;
      released = true;
      entry.calls -= 1;
      // undici frees a connection in the next turn of the event loop; a call
      // that comes sooner would open another one, which costs the guest.
      const settling = nextTurn().then(() => {
        if (entry.settling === settling) entry.settling = undefined;
      });
      entry.settling = settling;
      if (entry.calls === 0 && this.#entries.get(key) === entry) this.#expireWhenIdle(key, entry);
    };
    return { pool: entry.pool, release };
  }

  /** Forgets all connections to `address`: another VM lives there now. */
  async reset(address: EnvdAddress): Promise<void> {
    const key = keyOf(address);
    const entry = this.#entries.get(key);
    if (entry === undefined) return;
    this.#entries.delete(key);
    clearTimeout(entry.idle);
    await entry.pool.destroy(new RookeryError("guest_error", "The sandbox's VM has ended"));
  }

  async close(): Promise<void> {
    this.#closed = true;
    const entries = [...this.#entries.values()];
    this.#entries.clear();
    for (const entry of entries) clearTimeout(entry.idle);
    await Promise.all(entries.map((entry) => entry.pool.destroy()));
  }

  get size(): number {
    return this.#entries.size;
  }

  #open(key: string, { host, port }: EnvdAddress): Entry {
    const { connectMs, keepAliveMs } = this.#limits;
    const pool = new Pool(`http://${host}:${port}`, {
      connections: null,
      pipelining: 1,
      keepAliveTimeout: keepAliveMs,
      keepAliveMaxTimeout: keepAliveMs,
      headersTimeout: this.#limits.answerMs,
      bodyTimeout: this.#limits.fileIdleMs,
      connect: (_options, callback) => {
        connectRacing({ host, port, timeoutMs: connectMs }, (error, socket) => {
          if (socket === null) callback(error ?? new Error("no socket"), null);
          else callback(null, socket);
        });
      },
    });
    const entry: Entry = { pool, calls: 0, idle: undefined, settling: undefined };
    this.#entries.set(key, entry);
    return entry;
  }

  #expireWhenIdle(key: string, entry: Entry): void {
    entry.idle = setTimeout(() => {
      if (entry.calls > 0 || this.#entries.get(key) !== entry) return;
      this.#entries.delete(key);
      // Nothing is under way in it, so there is nothing to wait for and nobody to tell.
      entry.pool.destroy().catch(() => undefined);
    }, this.#limits.keepAliveMs);
    entry.idle.unref();
  }
}

function keyOf({ host, port }: EnvdAddress): string {
  return `${host}:${port}`;
}
