/**
 * A host agent as the services see it: what can be asked of one, in the model's
 * words. host-client.ts speaks to a real one.
 *
 * Every failure is a RookeryError. `host_unreachable` and `timeout` mean that
 * nobody knows whether it happened; every other code means that it did not.
 */
import type { SandboxId, SnapshotId, TeamId } from "../model/ids.ts";
import type { Lifetime } from "../model/sandbox.ts";

export type AgentPhase = "starting" | "running" | "pausing" | "paused" | "resuming" | "stopping" | "failed";

/** A sandbox, as its host says that it is. */
export interface AgentSandbox {
  id: SandboxId;
  phase: AgentPhase;
  /** Since when we have called it a stranger, if we have. */
  strangerForMs?: number | undefined;
  generation: bigint;
  vcpus: number;
  memoryMb: number;
  diskMb: number;
  startedAt?: Date | undefined;
  expiresAt?: Date | undefined;
  diskUsedBytes: number;
  /** Why its VM ended by itself. */
  exit?: { code: string; message: string } | undefined;
}

export interface AgentOperation {
  sandboxId: SandboxId;
  generation: bigint;
  deadline: Date;
}

export interface AgentSandboxSpec extends Lifetime {
  source: { kind: "image"; name: string } | { kind: "snapshot"; id: SnapshotId };
  vcpus: number;
  memoryMb: number;
  diskMb: number;
  env: Readonly<Record<string, string>>;
  teamId: TeamId;
  envdAccessToken: string;
}

export interface AgentCommand {
  cmd: string;
  args: readonly string[];
  shell: boolean;
  cwd?: string | undefined;
  env: Readonly<Record<string, string>>;
  user?: string | undefined;
  stdin?: Uint8Array | undefined;
  timeoutMs: number;
}

export interface AgentExecResult {
  stdout: Uint8Array;
  stderr: Uint8Array;
  exitCode: number;
  signal?: string | undefined;
  timedOut: boolean;
  truncated: boolean;
  durationMs: number;
}

export interface AgentEvent {
  number: bigint;
  /** Undefined: the host names what is no sandbox. */
  sandboxId: SandboxId | undefined;
  generation: bigint;
  kind: string;
  reason: string;
  message: string;
}

export interface HostAgent {
  createSandbox(operation: AgentOperation, spec: AgentSandboxSpec): Promise<AgentSandbox>;
  destroySandbox(operation: AgentOperation): Promise<void>;
  pauseSandbox(operation: AgentOperation): Promise<AgentSandbox>;
  resumeSandbox(operation: AgentOperation): Promise<AgentSandbox>;
  updateSandbox(id: SandboxId, lifetime: Lifetime): Promise<AgentSandbox>;
  /** The new expiry. */
  pingSandbox(id: SandboxId): Promise<Date | undefined>;
  /** Undefined: not here. */
  getSandbox(id: SandboxId, signal?: AbortSignal): Promise<AgentSandbox | undefined>;
  listSandboxes(
    page: { after: string; limit: number },
    signal?: AbortSignal,
  ): Promise<{ items: AgentSandbox[]; more: boolean }>;

  /** No row knows it: its guest stops in memory, and its host remembers since when. */
  freezeSandbox(id: SandboxId, signal: AbortSignal): Promise<AgentSandbox>;
  /** A row knows it after all: it goes on. */
  thawSandbox(id: SandboxId, signal: AbortSignal): Promise<AgentSandbox>;

  exec(id: SandboxId, command: AgentCommand, signal: AbortSignal): Promise<AgentExecResult>;
  writeFile(
    id: SandboxId,
    path: string,
    content: AsyncIterable<Uint8Array>,
    signal: AbortSignal,
  ): Promise<void>;
  readFile(
    id: SandboxId,
    path: string,
    signal: AbortSignal,
  ): Promise<{ sizeBytes?: number | undefined; content: AsyncIterable<Uint8Array> }>;

  createSnapshot(
    operation: AgentOperation,
    snapshotId: SnapshotId,
    teamId: TeamId,
  ): Promise<{
    vcpus: number;
    memoryMb: number;
    diskMb: number;
    sizeBytes: number;
    compat?: string | undefined;
  }>;
  /** Of `ids`, those that lie in an object store as wholes, and in which. */
  storedSnapshots(
    ids: readonly SnapshotId[],
    signal: AbortSignal,
  ): Promise<{ id: SnapshotId; storeId: string }[]>;
  /** On that host and in its object store. */
  deleteSnapshot(id: SnapshotId): Promise<void>;

  /** Events after a number, then the ones that come, until `signal` aborts. */
  followEvents(
    after: bigint,
    signal: AbortSignal,
  ): AsyncIterable<{ logId: string; event: AgentEvent | undefined }>;
  acknowledgeEvents(logId: string, number: bigint): Promise<void>;

  /** The host was deleted: it destroys all that it has, forgets who it was, and its agent ends. */
  endHost(signal: AbortSignal): Promise<void>;
}
