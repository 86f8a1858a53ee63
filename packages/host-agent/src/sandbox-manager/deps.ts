/**
 * What the agent's core is given: seams, limits, and the three things that a
 * simulated run replays from its seed (clock, random, timers).
 */
import type { Failpoints } from "@rookery/protocol/failpoints";
import type { GuestNetworkDriver } from "../guest-network/guest-network.ts";
import type { ProcessIdentity } from "../host/process.ts";
import type { RootDiskDriver } from "../root-disk/root-disk.ts";
import type { VmCgroups } from "../vm-pool/vm-cgroups.ts";
import type { VmmDriver, VmShape } from "../vmm/vmm.ts";
import type { Clock } from "./clock.ts";
import type { GuestAgent } from "./guest.ts";
import type { SnapshotStore } from "./snapshot-store.ts";
import type { WarmImages } from "./warm-images.ts";

/** The part of pino that is used here. */
export interface Logger {
  info(facts: object, message: string): void;
  warn(facts: object, message: string): void;
  error(facts: object, message: string): void;
  debug(facts: object, message: string): void;
}

export interface HostFacts {
  /** /proc/sys/kernel/random/boot_id. */
  bootId: string;
  /** What an unprivileged writer may still take of the file system at `path`. */
  freeDiskBytes(path: string): Promise<number>;
  /** Ends a process of a former agent by SIGKILL, and waits until it is gone; nothing when it is gone already. */
  killProcess(identity: ProcessIdentity): Promise<undefined>;
  /** Ends every process of a uid that only VMMs of ours have: what a crash left without a record. */
  killProcessesOf(uid: number): Promise<void>;
  /** The same where VMMs have the agent's own uid: by the working directory that only one VMM's processes have. */
  killProcessesIn(directory: string): Promise<void>;
}

export interface ManagerConfig {
  dataDir: string;
  /** Short: VMs' control sockets lie in it, one directory each. */
  socketRoot: string;
  /** Name that begins all our cgroups, such as `rookery-1a2b3c4d/`. */
  cgroupPrefix: string;
  /** uid of slot 0; undefined where the agent is not root and VMMs run as it. */
  uidBase: number | undefined;
  maxSlots: number;
  pool: {
    /** Waiting clones of `image` in `shape`; 0 turns the pool off. */
    size: number;
    image: string;
    shape: VmShape;
    /** Clones spawned side by side in the background. */
    refillConcurrency: number;
    /** How long the refill gives way to operations at most. */
    refillYieldMs: number;
  };
  /** Operations at work at once, over all sandboxes. */
  workLimit: number;
  /** Commands that may wait for one sandbox. */
  maxQueuedPerSandbox: number;
  /** Sandboxes that may exist here, paused ones too. */
  maxSandboxes: number;
  /** Sum of the guest memory of live sandboxes, over-commit ratio included. */
  memoryBudgetMb: number;
  /** No sandbox starts and no snapshot is made when less than this is free: the rest is for pausing what runs. */
  diskReserveBytes: number;
  /** Copies of snapshots that the object store has; those that are used longest ago go beyond it. */
  snapshotCacheBytes: number;
  /** Between two looks for what no snapshot in the store needs any more. */
  storeSweepIntervalMs: number;
  /** With less free than this no pause is tried: a guest is stopped in memory instead. */
  pauseFloorBytes: number;
  /** A fork of a running sandbox is refused when its chain has this many layers. */
  maxDiskChain: number;
  reaperIntervalMs: number;
  hang: {
    /** 0 turns the watch off. */
    intervalMs: number;
    timeoutMs: number;
    misses: number;
  };
  /** How long envd may take to answer after a thaw. */
  guestTimeoutMs: number;
  /** Undo is not bound by the command's deadline, but by this. */
  undoTimeoutMs: number;
  /** What the agent does to a sandbox by itself gets this much time. */
  ownWorkTimeoutMs: number;
  /** Between two tries to finish what could not be undone or destroyed. */
  retryIntervalMs: number;
  tombstones: { maxAgeMs: number; maxCount: number };
  maxEvents: number;
}

/** Everything that decides nothing about this host; `main.ts` sets the rest. */
export const MANAGER_DEFAULTS = {
  pool: {
    size: 4,
    image: "base",
    shape: { vcpus: 1, memoryMb: 512 },
    refillConcurrency: 2,
    refillYieldMs: 3_000,
  },
  maxQueuedPerSandbox: 16,
  maxSandboxes: 1_000,
  diskReserveBytes: 1 << 30,
  snapshotCacheBytes: 20 * 2 ** 30,
  storeSweepIntervalMs: 6 * 3_600_000,
  pauseFloorBytes: 64 << 20,
  maxDiskChain: 48,
  reaperIntervalMs: 500,
  hang: { intervalMs: 10_000, timeoutMs: 5_000, misses: 3 },
  guestTimeoutMs: 30_000,
  undoTimeoutMs: 30_000,
  ownWorkTimeoutMs: 120_000,
  retryIntervalMs: 5_000,
  tombstones: { maxAgeMs: 24 * 3_600_000, maxCount: 20_000 },
  maxEvents: 10_000,
} as const satisfies Partial<ManagerConfig>;

export interface Deps {
  config: ManagerConfig;
  clock: Clock;
  /** Cryptographic, except in a simulated run. */
  randomBytes(count: number): Uint8Array;
  logger: Logger;
  host: HostFacts;
  vmm: VmmDriver;
  rootDisk: RootDiskDriver;
  network: GuestNetworkDriver;
  cgroups: VmCgroups;
  warmImages: WarmImages;
  /** Undefined: snapshots stay on the host that made them. */
  snapshotStore?: SnapshotStore | undefined;
  guest: GuestAgent;
  failpoints: Failpoints;
}
