/**
 * What all operations share: the entries of sandboxes and snapshots, and the
 * way from memory to the journal.
 *
 * Invariant: only the operation at work on a sandbox (its queue is serial)
 * changes the entry's record, save for generation and last command, which a
 * command sets when it is accepted.
 */
import { RookeryError } from "@rookery/protocol/errors";
import type { EventLog } from "../events/event-log.ts";
import type { LayerId, SandboxId, SnapshotId, VmId } from "../ids.ts";
import type { Journal } from "../journal/journal.ts";
import type { OperationKind, SandboxRecord, SnapshotRecord, VmPlaceRecord } from "../journal/records.ts";
import type { Tombstones } from "../journal/tombstones.ts";
import type { RootDisk } from "../root-disk/root-disk.ts";
import type { PlacedVm, VmPool } from "../vm-pool/vm-pool.ts";
import { deadlineSignal } from "./clock.ts";
import type { Deps } from "./deps.ts";
import type { DiskLayers } from "./disk-layers.ts";
import type { GuestAddress } from "./guest.ts";
import type { EnvdTarget, SandboxPhase, SandboxView } from "./sandbox.ts";
import { SerialQueue } from "./serial-queue.ts";
import type { StepTools } from "./steps.ts";
import type { WorkLimit } from "./work-limit.ts";

export interface Core {
  deps: Deps;
  journal: Journal;
  tombstones: Tombstones;
  events: EventLog;
  pool: VmPool;
  workLimit: WorkLimit;
  layers: DiskLayers;
  sandboxes: Map<SandboxId, SandboxEntry>;
  snapshots: Map<SnapshotId, SnapshotRecord>;
  /** VMs in the journal of the agent before this one; used by recovery. */
  formerVms: Map<VmId, VmPlaceRecord>;
}

/** Of an envd that was started again in its guest: see revive-guest.ts. */
export interface Revivals {
  underWay: { promise: Promise<boolean>; abort: AbortController } | undefined;
  /** Such as followed each other closely. */
  inARow: number;
  /** The last of them. */
  succeeded: boolean;
  notBeforeMs: number;
}

export class SandboxEntry {
  record: SandboxRecord;
  /** The VM of a running sandbox; of a paused or failed one until it is released. */
  placed: PlacedVm | undefined;
  disk: RootDisk | undefined;
  /** Open uses of envd. */
  readonly uses = new Set<AbortController>();
  lastActivityMs: number;
  readonly queue: SerialQueue;
  /** The command at work or waiting last, for those who repeat it. */
  underWay:
    | { kind: OperationKind; generation: bigint; promise: Promise<SandboxView>; abort: AbortController }
    | undefined;
  /** Disk layers that nobody else may need, once it is gone. */
  readonly orphans = new Set<LayerId>();
  /** Let in to be resumed, so that its memory counts; its phase says so only later. */
  isResuming = false;
  /** A list of steps without undo did not get through: the janitor runs it again. */
  unfinished = false;
  /** Recovery did not get through: what its record says is not what is. */
  unsettled = false;
  /** An expiry that failed is not tried again before. */
  expireNotBeforeMs = 0;
  hangMisses = 0;
  readonly revivals: Revivals = { underWay: undefined, inARow: 0, succeeded: false, notBeforeMs: 0 };

  constructor(record: SandboxRecord, options: { maxQueued: number; nowMs: number }) {
    this.record = record;
    this.queue = new SerialQueue(options.maxQueued);
    this.lastActivityMs = options.nowMs;
  }

  get id(): SandboxId {
    return this.record.spec.id;
  }
  get phase(): SandboxPhase {
    return this.record.phase;
  }
  set(changes: Partial<SandboxRecord>): void {
    this.record = { ...this.record, ...changes };
  }

  endUses(reason: Error): void {
    for (const use of this.uses) use.abort(reason);
  }
}

export async function persist(core: Core, entry: SandboxEntry, options: { durable: boolean }): Promise<void> {
  entry.set({ bootId: core.deps.host.bootId });
  await core.journal.writeSandbox(entry.record, options);
}

export function requirePhase(entry: SandboxEntry, allowed: readonly SandboxPhase[], what: string): void {
  if (allowed.includes(entry.phase)) return;
  throw new RookeryError("wrong_state", `a sandbox that is ${entry.phase} cannot be ${what}`, {
    details: { status: entry.phase },
  });
}

export function guestAddressOf(placed: PlacedVm): GuestAddress {
  const { envdHost, envdPort } = placed.place.record.lease;
  return { host: envdHost, port: envdPort };
}

export function envdTargetOf(entry: SandboxEntry, placed: PlacedVm): EnvdTarget {
  return { ...guestAddressOf(placed), accessToken: entry.record.spec.envdAccessToken };
}

/** What the journal keeps of a sandbox's VM. */
export function vmReferenceOf(placed: PlacedVm): NonNullable<SandboxRecord["vm"]> {
  const { vmId, uid, runDir } = placed.place.record;
  return { vmId, uid, runDir };
}

/** Undo, and what cannot be undone, get this much time, whatever the command's deadline. */
export function undoLimit(core: Core): { signal: AbortSignal } & Disposable {
  const { clock, config } = core.deps;
  return deadlineSignal(
    clock,
    config.undoTimeoutMs,
    () => new RookeryError("timeout", "undoing took too long"),
  );
}

export function stepTools(core: Core, operation: string): StepTools {
  const { failpoints, clock, logger } = core.deps;
  return { operation, failpoints, clock, logger, timings: {} };
}

/** Puts the event that the record holds into the log; the record is written without it afterwards. */
export async function reportPendingEvent(core: Core, entry: SandboxEntry): Promise<void> {
  const event = entry.record.pendingEvent;
  if (event === undefined) return;
  await core.events.append({ sandboxId: entry.id, generation: entry.record.generation, ...event });
  entry.set({ pendingEvent: undefined });
}

export function newEvent(
  core: Core,
  kind: "paused" | "stopped" | "failed" | "resumed",
  why: { reason: string; message: string },
): NonNullable<SandboxRecord["pendingEvent"]> {
  return { kind, ...why, occurredAtUnixMs: core.deps.clock.nowMs() };
}
