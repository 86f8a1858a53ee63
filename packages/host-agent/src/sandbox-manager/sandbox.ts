/**
 * A sandbox as this host knows it: what is asked of it, what it is now.
 *
 * The border (rpc/) parses requests into these types; inside, they are trusted.
 */
import type { SandboxId, SnapshotId } from "../ids.ts";

export type SandboxPhase = "starting" | "running" | "pausing" | "paused" | "resuming" | "stopping" | "failed";

export interface Lifetime {
  /** 0: no limit. */
  timeoutSec: number;
  onTimeout: "pause" | "destroy";
  mode: "idle" | "absolute";
}

export type SandboxSource = { kind: "image"; name: string } | { kind: "snapshot"; snapshotId: SnapshotId };

export interface SandboxSpec {
  id: SandboxId;
  teamId: string;
  source: SandboxSource;
  vcpus: number;
  memoryMb: number;
  diskMb: number;
  lifetime: Lifetime;
  env: Readonly<Record<string, string>>;
  /** Needed to talk to envd, so it is kept in the 0600 journal. */
  envdAccessToken: string;
}

/** From which generation on, and until when, a command counts. */
export interface Operation {
  sandboxId: SandboxId;
  generation: bigint;
  deadlineUnixMs: number;
}

/** What the rest of the agent and the control plane see. */
export interface SandboxView {
  id: SandboxId;
  phase: SandboxPhase;
  /** Paused, but kept by its VM alone: a reboot of the host ends it. */
  inMemory: boolean;
  /** Since when the control plane has called it a stranger, if it has. */
  strangerForMs?: number;
  generation: bigint;
  vcpus: number;
  memoryMb: number;
  diskMb: number;
  lifetime: Lifetime;
  /** 0: none. */
  expiresAtUnixMs: number;
  startedAtUnixMs: number;
  diskUsedBytes: number;
  exit?: { code: string; message: string };
}

export interface SnapshotView {
  snapshotId: SnapshotId;
  vcpus: number;
  memoryMb: number;
  diskMb: number;
  sizeBytes: number;
  /** What a host must have to load it: see compat.ts. Undefined in those of older agents: only this host may. */
  compat?: string | undefined;
  /** Object store that has all of it; undefined: none yet. */
  storeId?: string | undefined;
}

/** What the agent did by itself, for the control plane. */
export interface HostEvent {
  number: bigint;
  sandboxId: SandboxId;
  generation: bigint;
  kind: "paused" | "stopped" | "failed" | "resumed";
  reason: string;
  message: string;
  occurredAtUnixMs: number;
}

/** Where envd of a running sandbox is reached, and the token it takes. */
export interface EnvdTarget {
  host: string;
  port: number;
  accessToken: string;
}

/**
 * The operations that rpc/ may call; SandboxManager (sandbox-manager.ts)
 * implements it. Errors are RookeryErrors with a code of the error table.
 */
export interface SandboxOperations {
  create(spec: SandboxSpec, operation: Operation): Promise<SandboxView>;
  destroy(operation: Operation): Promise<void>;
  pause(operation: Operation): Promise<SandboxView>;
  resume(operation: Operation, lifetime?: Lifetime): Promise<SandboxView>;
  update(id: SandboxId, lifetime: Lifetime): Promise<SandboxView>;
  /** Begins an idle time-out anew; the answer is the new expiry, 0 for none. */
  ping(id: SandboxId): Promise<number>;
  get(id: SandboxId): Promise<SandboxView>;
  /** Ids above `after`, ascending. */
  list(options: { after?: SandboxId; limit: number }): Promise<{ items: SandboxView[]; more: boolean }>;
  createSnapshot(operation: Operation, snapshotId: SnapshotId, teamId: string): Promise<SnapshotView>;
  /** Here and in the object store. Idempotent. */
  deleteSnapshot(snapshotId: SnapshotId): Promise<void>;
  /** Those of `ids` that are here. */
  getSnapshots(ids: readonly SnapshotId[]): SnapshotView[];
  /** The control plane has no row of it: it is held until `thaw`, a command for it, or its end. Again: the same. */
  freeze(id: SandboxId): Promise<SandboxView>;
  /** There is a row: it goes on as it was. Does nothing for one that is no stranger. */
  thaw(id: SandboxId): Promise<SandboxView>;
  /**
   * Runs `use` against envd of a running sandbox and counts as activity from
   * begin to end: an idle sandbox does not expire, nor is it paused by expiry,
   * under an open use. Throws wrong_state when it does not run; a VM that dies
   * meanwhile aborts `signal`.
   */
  withEnvd<T>(id: SandboxId, use: (target: EnvdTarget, signal: AbortSignal) => Promise<T>): Promise<T>;
  /**
   * To be called when a call to envd failed by `guest_error`: finds out whether
   * envd was started again in its guest, and gives it its identity then. True:
   * envd serves this sandbox, so a call that did nothing may be made again.
   * Ends within a bound, and never throws.
   */
  reviveGuest(id: SandboxId): Promise<boolean>;
  events: HostEventLog;
}

export interface HostEventLog {
  readonly logId: string;
  readonly lastNumber: bigint;
  /** Events after `after`, oldest first; with `follow`, waits for more until `signal` aborts. */
  read(options: { after: bigint; follow: boolean; signal: AbortSignal }): AsyncIterable<HostEvent>;
  acknowledge(logId: string, number: bigint): Promise<void>;
}
