/**
 * A whole simulated host in one directory: what the agent's core is tested on.
 *
 * `traces()` lists everything that exists on it, so that a test can demand that
 * a failed operation left the host as it was.
 */
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, mkdtempSync, readdirSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, relative } from "node:path";
import type { Logger } from "../deps.ts";
import { Failpoints, type FailpointOptions } from "@rookery/protocol/failpoints";
import type { SandboxId, SnapshotId, WarmKey } from "../../ids.ts";
import { openSimulatedNetwork } from "../../guest-network/simulated.ts";
import { SimulatedGuests } from "../../guest/simulated-guests.ts";
import { openSimulatedDisks } from "../../root-disk/simulated.ts";
import { seededRandom } from "../../simulated/seeded-random.ts";
import { openSimulatedCgroups } from "../../simulated/simulated-cgroups.ts";
import { directoryProcessTable, type ProcessTable } from "../../vmm/simulated-processes.ts";
import { openSimulatedVmm, type SimulatedVmmDriver, type SimulatedVmmOptions } from "../../vmm/simulated.ts";
import { systemClock, type Clock } from "../clock.ts";
import { FAILPOINTS } from "../operations.ts";
import { MANAGER_DEFAULTS, type Deps, type ManagerConfig } from "../deps.ts";
import type { Operation, SandboxSpec } from "../sandbox.ts";
import type { WarmImage } from "../warm-images.ts";

export interface SimulatedMachineOptions {
  clock?: Clock;
  bootId?: string;
  failpoints?: Omit<FailpointOptions, "known">;
  config?: Partial<ManagerConfig>;
  /** Seed of ids and pids. */
  seed?: number;
  /** Thrown from within the effects of the seams. */
  trouble?: (effect: string) => void;
  logger?: Logger;
  freeDiskBytes?: () => number;
  /** A table that outlives this agent; the default one lies in the machine's directory. */
  processes?: ProcessTable;
  /** Passes the time that a VMM takes. */
  pause?: SimulatedVmmOptions["pause"];
}

export interface SimulatedMachine {
  deps: Deps;
  vmm: SimulatedVmmDriver;
  processes: ProcessTable;
  warm: WarmImage;
  /** Paths of all that exists, of sandboxes and of the host. */
  traces(): string[];
}

const MIB = 1 << 20;
export const DISK_MB = 4096;

export function openSimulatedMachine(root: string, options: SimulatedMachineOptions = {}): SimulatedMachine {
  const { trouble = () => undefined, clock = systemClock } = options;
  const random = seededRandom(options.seed ?? 1);
  const dataDir = join(root, "data");
  const hostDir = join(root, "host");
  const socketRoot = join(root, "sockets");
  const imagePath = join(root, "image.raw");
  mkdirSync(join(hostDir, "networks"), { recursive: true });
  // The template ran once, as its memory and its disk say.
  const baseMemory = JSON.stringify({ memory: {}, runs: 1 });
  if (!existsSync(imagePath)) {
    writeFileSync(imagePath, "1");
    mkdirSync(join(root, "warm"));
    writeFileSync(join(root, "warm", "memory.base"), baseMemory);
  }
  const processes = options.processes ?? directoryProcessTable(join(hostDir, "processes"));
  const { pause } = options;
  const vmm = openSimulatedVmm({ processes, random, guestWritesDisk: true, pause });
  const warm: WarmImage = {
    key: createHash("sha256").update("warm").digest("hex") as WarmKey,
    base: {
      dir: join(root, "warm"),
      shape: { vcpus: 1, memoryMb: 512 },
      memorySha256: createHash("sha256").update(baseMemory).digest("hex"),
      deviceStateSha256: "state",
      fingerprint: "simulated-1",
    },
    diskChain: [{ kind: "image", path: imagePath, format: "raw" }],
    diskSizeBytes: DISK_MB * MIB,
    shape: { vcpus: 1, memoryMb: 512 },
  };
  const config: ManagerConfig = {
    ...MANAGER_DEFAULTS,
    dataDir,
    socketRoot,
    cgroupPrefix: "rookery-test/",
    uidBase: undefined,
    maxSlots: 64,
    pool: { ...MANAGER_DEFAULTS.pool, size: 0 },
    workLimit: 4,
    memoryBudgetMb: 16 * 1024,
    ...options.config,
  };
  const deps: Deps = {
    config,
    clock,
    randomBytes: (count) => Uint8Array.from({ length: count }, () => Math.floor(random() * 256)),
    logger: options.logger ?? silentLogger,
    host: {
      bootId: options.bootId ?? "boot-1",
      freeDiskBytes: async () => options.freeDiskBytes?.() ?? 2 ** 40,
      killProcess: async ({ pid }) => {
        vmm.crash(pid, { reason: "killed", message: "by its host" });
        return undefined;
      },
      killProcessesOf: async () => undefined,
      killProcessesIn: async () => undefined,
    },
    vmm,
    rootDisk: openSimulatedDisks(trouble),
    network: openSimulatedNetwork(join(hostDir, "networks"), trouble),
    cgroups: openSimulatedCgroups(join(hostDir, "cgroups"), processes, trouble),
    warmImages: { ensure: async () => warm, open: async () => warm },
    guest: new SimulatedGuests({ processes, trouble }),
    failpoints: new Failpoints({ ...options.failpoints, known: FAILPOINTS }),
  };
  const traces = () =>
    [
      join(dataDir, "sandboxes"),
      join(dataDir, "vms"),
      join(dataDir, "snapshots"),
      join(dataDir, "layers"),
      hostDir,
      socketRoot,
    ]
      .flatMap((dir) => walk(dir))
      .map((path) => relative(root, path))
      .sort();
  return { deps, vmm, processes, warm, traces };
}

function walk(dir: string): string[] {
  if (!existsSync(dir)) return [];
  return readdirSync(dir, { withFileTypes: true }).flatMap((entry) => {
    const path = join(dir, entry.name);
    return entry.isDirectory() ? [path, ...walk(path)] : [path];
  });
}

/** A directory for one machine: in memory where that can be had, since these tests sync a lot. */
export function newRoot(): string {
  const parent = existsSync("/dev/shm") ? "/dev/shm" : tmpdir();
  return mkdtempSync(join(parent, "rk-machine-"));
}

const silentLogger: Logger = {
  info: () => undefined,
  warn: () => undefined,
  error: () => undefined,
  debug: () => undefined,
};

export const sandboxId = (name: string): SandboxId => `sb${name.padEnd(18, "0")}` as SandboxId;
export const snapshotId = (name: string): SnapshotId => `snap-${name.padEnd(20, "0")}` as SnapshotId;

export function specOf(id: SandboxId, changes: Partial<SandboxSpec> = {}): SandboxSpec {
  return {
    id,
    teamId: "team-1",
    source: { kind: "image", name: "base" },
    vcpus: 1,
    memoryMb: 512,
    diskMb: DISK_MB,
    lifetime: { timeoutSec: 0, onTimeout: "pause", mode: "idle" },
    env: {},
    envdAccessToken: `token-of-${id}`,
    ...changes,
  };
}

export function operationOf(
  id: SandboxId,
  generation: number,
  deadlineUnixMs = Date.now() + 60_000,
): Operation {
  return { sandboxId: id, generation: BigInt(generation), deadlineUnixMs };
}
