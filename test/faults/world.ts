/**
 * What a form of the suite has to offer: callers' way in, faults, and a look
 * behind everything for the oracle.
 */
import type { Fault } from "./schedule.ts";

export interface ApiRequest {
  method: "GET" | "POST" | "PATCH" | "DELETE";
  path: string;
  body?: unknown;
  idempotencyKey?: string;
}

export interface ApiAnswer {
  status: number;
  body: unknown;
}

/** Nobody knows whether the request was carried out. */
export class NoAnswer extends Error {
  override readonly name = "NoAnswer";
}

export interface World extends AsyncDisposable {
  /** As a caller of the API; rejects with NoAnswer. */
  call(replica: number, request: ApiRequest): Promise<ApiAnswer>;
  /** Begins it; it ends by itself after its time. */
  inject(fault: Fault): Promise<void>;
  /** Ends all faults for good; what is down comes back. */
  heal(): Promise<void>;
  observe(): Promise<Observed>;
  /** What two proofs of one kind should not both have got. */
  readonly doubleCredentials: readonly string[];
  /** Commands that were carried out after a newer one. */
  readonly staleCommands: readonly string[];
  /** Programs that ended, or spoke of a fault of their own, though nobody did anything to them. */
  readonly brokenPrograms: readonly string[];
  /** Faults that happened, by kind. */
  readonly faults: Readonly<Record<string, number>>;
}

export interface SandboxRow {
  id: string;
  status: string;
  generation: bigint;
  commandGeneration: bigint;
  hostId: string | undefined;
  tag: string | undefined;
  hasStarted: boolean;
  errorCode: string | undefined;
}

export interface HostRow {
  id: string;
  status: string;
  eventLogId: string | undefined;
  acknowledgedEvent: bigint;
}

export interface SnapshotRow {
  id: string;
  name: string;
  status: string;
  hostId: string;
}

/** One machine, as it really is. */
export interface MachineFacts {
  hostId: string;
  isUp: boolean;
  /** As its agent says. */
  sandboxes: { id: string; phase: string; generation: bigint; vmId: string | undefined }[];
  vms: { vmId: string; state: string; corrupt: boolean; memory: Readonly<Record<string, string>> }[];
  snapshots: string[];
  /** What is there and nobody owns, or is owned and not there. */
  leaks: string[];
  eventLogId: string;
  lastEvent: bigint;
}

export interface Observed {
  sandboxes: SandboxRow[];
  snapshots: SnapshotRow[];
  hosts: HostRow[];
  teams: { id: string; live: number; counted: number }[];
  machines: MachineFacts[];
}
