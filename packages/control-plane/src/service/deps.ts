/** What every use case is given. Time, randomness and ids come with it, so that a run can be replayed. */
import type { HostCredentials } from "../hosts/credentials.ts";
import type { Cluster } from "../hosts/cluster.ts";
import type { Scheduler } from "../hosts/scheduler.ts";
import type { HostDeps } from "../hosts/settle.ts";
import type { NewIds, Random } from "../model/new-ids.ts";
import type { Sealer } from "../model/sealer.ts";

export interface ServiceOptions {
  /** Sandboxes that are not final, per team, where its row names no other number. */
  maxSandboxesPerTeam: number;
  /** The longest that each may take on its host; a create may have to boot a warm image first. */
  createMs: number;
  pauseMs: number;
  resumeMs: number;
  destroyMs: number;
  snapshotMs: number;
  /** A row at work is ours for so long without being renewed: then our replica is dead. */
  leaseMs: number;
  /** Looking at the host when somebody looks at a sandbox. */
  lookMs: number;
  /** How long a replica may believe what it learnt of API keys and of where sandboxes run; how many of each. */
  cacheMs: number;
  cacheSize: number;
  keyTouchMs: number;
  idempotencyLeaseMs: number;
  idempotencyKeepMs: number;
  /** How long a call waits for another one with the same key. */
  idempotencyWaitMs: number;
  /** Streams of events that a team may have open, on each replica. */
  maxStreamsPerTeam: number;
}

export const SERVICE_DEFAULTS: ServiceOptions = {
  maxSandboxesPerTeam: 1_000,
  createMs: 180_000,
  pauseMs: 120_000,
  resumeMs: 120_000,
  destroyMs: 60_000,
  snapshotMs: 180_000,
  leaseMs: 30_000,
  lookMs: 1_500,
  cacheMs: 5_000,
  cacheSize: 10_000,
  keyTouchMs: 60_000,
  idempotencyLeaseMs: 15_000,
  idempotencyKeepMs: 24 * 3_600_000,
  idempotencyWaitMs: 240_000,
  maxStreamsPerTeam: 100,
};

export interface Deps extends HostDeps {
  ids: NewIds;
  random: Random;
  sealer: Sealer;
  cluster: Cluster;
  credentials: HostCredentials;
  scheduler: Scheduler;
  options: ServiceOptions;
  /** Database migrated? Asked by readiness. */
  isMigrated(): Promise<boolean>;
  /** A host registered or returned: its monitor and its event reader needn't wait for their turn. */
  onHostSeen(): void;
}
