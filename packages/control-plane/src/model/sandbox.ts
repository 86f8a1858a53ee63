/** A sandbox as the control plane and its callers know it. */
import type { HostId, SandboxId, TeamId } from "./ids.ts";

export const SANDBOX_STATUSES = [
  "pending",
  "starting",
  "running",
  "pausing",
  "paused",
  "resuming",
  "missing",
  "stopping",
  "stopped",
  "error",
] as const;
export type SandboxStatus = (typeof SANDBOX_STATUSES)[number];

export interface Lifetime {
  /** 0: no limit. */
  timeoutSec: number;
  onTimeout: "pause" | "destroy";
  timeoutMode: "idle" | "absolute";
}

/** What lists have of each: 200 environments could weigh 50 MB. */
export interface SandboxSummary extends Lifetime {
  id: SandboxId;
  teamId: TeamId;
  status: SandboxStatus;
  generation: bigint;
  /** Name of the template or snapshot that it was made from. */
  template: string;
  hostId?: HostId;
  vcpus: number;
  memoryMb: number;
  diskMb: number;
  metadata: Readonly<Record<string, string>>;
  createdAt: Date;
  startedAt?: Date;
  expiresAt?: Date;
  endedAt?: Date;
  /** Why it failed, or why its last pause or resume went back. */
  error?: { code: string; message: string };
  diskUsedBytes?: number;
}

export interface Sandbox extends SandboxSummary {
  env: Readonly<Record<string, string>>;
}
