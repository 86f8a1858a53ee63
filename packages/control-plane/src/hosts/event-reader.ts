/**
 * Reads what hosts did by themselves (expiry, crashes) from their event logs.
 *
 * Each online host is read by one replica at a time, under a lease that is
 * renewed. An event's effect and its number go into one transaction, and only
 * after the commit is it acknowledged: whichever side dies, nothing is lost,
 * and what is read twice applies once.
 */
import { type ErrorCode, RookeryError, isErrorCode } from "@rookery/protocol/errors";
import {
  adoptEventLog,
  claimEventReading,
  recordEventRead,
  releaseEventReading,
} from "../db/host-event-reading.ts";
import type { HostRecord } from "../db/hosts.ts";
import { type SandboxSummaryRecord, findSandboxes, moveSandbox } from "../db/sandboxes.ts";
import type { HostId } from "../model/ids.ts";
import { type SandboxEvent, isFinal, isWork, nextStatus } from "../model/sandbox-state.ts";
import { Allowance } from "./allowance.ts";
import type { AgentEvent, HostAgent } from "./host-agent.ts";
import { type HostDeps, agentOf, releaseVm } from "./settle.ts";

export interface ReaderOptions {
  /** Names this replica in leases. */
  reader: string;
  leaseMs: number;
  /** Hosts that one replica reads. */
  maxHosts: number;
  /** Before a stream that broke is opened again. */
  againMs: number;
}

/**
 * All sandboxes of a host may expire together; one that goes on like that lies,
 * and harms itself: its own events come late.
 */
const ALLOWANCE = { burst: 5_000, perSec: 50 };
const MAX_LOG_ID_LENGTH = 128;

const EVENTS: Readonly<Record<string, SandboxEvent>> = {
  paused: "seenPaused",
  resumed: "seenRunning",
  stopped: "gone",
  failed: "died",
};

interface Reading {
  epoch: number;
  stop: AbortController;
  done: Promise<void>;
}

export class EventReader {
  readonly #deps: HostDeps;
  readonly #options: ReaderOptions;
  readonly #readings = new Map<HostId, Reading>();

  constructor(deps: HostDeps, options: ReaderOptions) {
    this.#deps = deps;
    this.#options = options;
  }

  /** Claims hosts and renews claims; begins and ends streams accordingly. */
  async round(): Promise<void> {
    const { reader, leaseMs, maxHosts } = this.#options;
    const ours = await claimEventReading(this.#deps.db, { reader, leaseMs, limit: maxHosts });
    const byId = new Map(ours.map((host) => [host.id, host]));
    for (const [id, reading] of this.#readings) {
      if (byId.get(id)?.epoch !== reading.epoch) await this.#stop(id, reading);
    }
    for (const host of ours) if (!this.#readings.has(host.id)) this.#start(host);
  }

  async close(): Promise<void> {
    await Promise.all([...this.#readings].map(([id, reading]) => this.#stop(id, reading)));
    await releaseEventReading(this.#deps.db, this.#options.reader);
  }

  #start(host: HostRecord): void {
    const agent = agentOf(this.#deps.pool, host);
    if (!agent) return;
    const stop = new AbortController();
    const done = this.#readAlways(host, agent, stop.signal);
    this.#readings.set(host.id, { epoch: host.epoch, stop, done });
  }

  async #stop(id: HostId, reading: Reading): Promise<void> {
    this.#readings.delete(id);
    reading.stop.abort();
    await reading.done;
  }

  async #readAlways(host: HostRecord, agent: HostAgent, signal: AbortSignal): Promise<void> {
    const { clock, log } = this.#deps;
    const read = {
      logId: host.eventLogId,
      after: host.acknowledgedEvent,
      allowance: new Allowance({ ...ALLOWANCE, now: clock.now() }),
    };
    while (!signal.aborted) {
      try {
        await this.#follow(host.id, agent, read, signal);
      } catch (cause) {
        if (!signal.aborted) log.warn({ err: cause, host: host.id }, "a host's events can't be read now");
      }
      await clock.sleep(this.#options.againMs, signal);
    }
  }

  async #follow(
    id: HostId,
    agent: HostAgent,
    read: { logId: string | undefined; after: bigint; allowance: Allowance },
    signal: AbortSignal,
  ): Promise<void> {
    const { clock } = this.#deps;
    for await (const { logId, event } of agent.followEvents(read.after, signal)) {
      // Meanwhile the stream's own flow control holds the host back.
      const waitMs = read.allowance.take(clock.now());
      if (waitMs > 0) await clock.sleep(waitMs, signal);
      if (signal.aborted) return;
      if (logId.length > MAX_LOG_ID_LENGTH) throw nonsense("its log's id is too long");
      if (logId !== read.logId) {
        // Numbers of another log mean nothing in this one: it is read from its beginning.
        await adoptEventLog(this.#deps.db, id, logId);
        const isFromStart = read.after === 0n;
        read.logId = logId;
        read.after = 0n;
        if (!isFromStart) return;
      }
      if (!event) continue;
      if (event.number <= read.after) throw nonsense("its events go backwards");
      await this.apply(id, agent, logId, event);
      read.after = event.number;
      await agent.acknowledgeEvents(logId, event.number);
    }
  }

  /** Applies one event if it still is about the row as it stands. */
  async apply(id: HostId, agent: HostAgent, logId: string, event: AgentEvent): Promise<void> {
    const { db, log } = this.#deps;
    const moved = await db.transaction().execute(async (tx) => {
      // First: hosts are locked before their sandboxes, here as everywhere (db/sandboxes.ts).
      await recordEventRead(tx, id, logId, event.number);
      const [row] = event.sandboxId ? await findSandboxes(tx, [event.sandboxId]) : [];
      const change = row && changeOf(id, row, event);
      return change && moveSandbox(tx, row, change.event, change.patch);
    });
    if (!moved) return;
    db.news.tell(moved.teamId);
    log.info(
      { host: id, sandbox: event.sandboxId, kind: event.kind, reason: event.reason, status: moved.status },
      "a host did something by itself",
    );
    if (isFinal(moved.status)) await releaseVm(this.#deps, agent, moved);
  }
}

const nonsense = (what: string): RookeryError =>
  new RookeryError("host_error", `The host's word makes no sense: ${what}.`);

function changeOf(
  hostId: HostId,
  row: SandboxSummaryRecord,
  { kind, generation, reason, message }: AgentEvent,
) {
  const event = EVENTS[kind];
  const next = event && nextStatus(row.status, event);
  // Of an older command, of another host, or of a kind that we don't know yet: the monitor sees what is true.
  if (!next || isWork(next) || row.hostId !== hostId || row.commandGeneration !== generation)
    return undefined;
  // Work under way ends with its own answer; only its death is news.
  if (isWork(row.status) && event !== "died") return undefined;
  const code: ErrorCode = isErrorCode(reason) ? reason : "guest_error";
  const error =
    event === "died" ? { code, message: message || reason || "Its VM ended by itself." } : undefined;
  return {
    event,
    patch: { ...(event !== "seenRunning" && { expiresAt: null }), error, reason: reason || undefined },
  };
}
