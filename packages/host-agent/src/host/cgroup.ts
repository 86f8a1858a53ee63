/**
 * Cgroups for VMMs, on v2, on v1, or on a hybrid of both.
 *
 * A group is one name below each mount that holds one of our controllers
 * (memory, pids, cpu): on v2 one directory, on v1 up to three. Names begin at
 * the root of the hierarchy, not at the agent's own group: a VMM outlives its
 * agent, which must find the group again from wherever it is started next.
 *
 * Invariants: a group that `makeCgroup` gave has all its limits set before any
 * process is in it; `removeCgroup` leaves no process of it alive.
 */
import { readFile, mkdir, readdir, rmdir, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { isErrno } from "./errno.ts";

const CONTROLLERS = ["memory", "pids", "cpu"] as const;
type Controller = (typeof CONTROLLERS)[number];

/** The kernel's default, in both versions' own units: v1 `cpu.shares`, v2 `cpu.weight`. */
const DEFAULT_WEIGHT = 100;
const DEFAULT_SHARES = 1024;
const CPU_PERIOD_US = 100_000;
/** How long killed processes may take to leave a group; a VMM frees its memory meanwhile. */
const REMOVE_TIMEOUT_MS = 20_000;
const REMOVE_POLL_MS = 5;

export interface CgroupLimits {
  /**
   * Memory and swap that the group may hold. A clone's guest memory counts up
   * to twice: once as its private pages, and once more where it is the first
   * to touch a page of the shared base.
   */
  memoryBytes: number;
  /** Processes and threads. */
  pids: number;
  /** Share under contention; 100 is everyone's default. */
  cpuWeight?: number;
  /** Never more than this many CPUs' time. */
  cpuQuotaCores?: number;
}

export interface Cgroup {
  readonly name: string;
  /** Files to write a pid into, before that process starts others. */
  readonly procs: readonly string[];
  /** How often the kernel killed one of its processes for want of memory. */
  oomKills(): Promise<number>;
  /** Kills what is in it and removes it. Bears running twice. */
  remove(signal?: AbortSignal): Promise<void>;
}

/** One mounted hierarchy, and which of our controllers are in it. */
interface Hierarchy {
  version: 1 | 2;
  mountPoint: string;
  controllers: Controller[];
}

/**
 * Makes the group `name` (such as `rookery-1a2b3c4d/vm0`, parents included), or
 * sets the limits of the one that is there. Controllers that this host lacks
 * are left out; `probeCgroups` names them.
 */
export async function makeCgroup(name: string, limits: CgroupLimits): Promise<Cgroup> {
  const hierarchies = await findHierarchies();
  for (const hierarchy of hierarchies) {
    const directory = directoryOf(hierarchy, name);
    if (hierarchy.version === 2) await delegateControllers(hierarchy, name);
    await mkdir(directory, { recursive: true });
    for (const controller of hierarchy.controllers) {
      for (const [file, value, need] of limitFiles(hierarchy.version, controller, limits)) {
        await writeFile(join(directory, file), value, { flag: "r+" }).catch((cause: unknown) => {
          if (!(need === "optional" && isErrno(cause, "ENOENT", "EOPNOTSUPP"))) {
            throw new Error(`cgroup ${name}: ${file} does not take ${value}`, { cause });
          }
        });
      }
    }
  }
  return {
    name,
    procs: hierarchies.map((hierarchy) => join(directoryOf(hierarchy, name), "cgroup.procs")),
    oomKills: () => readOomKills(hierarchies, name),
    remove: (signal) => removeCgroup(name, signal),
  };
}

/** Kills what is in the group and below it, and removes it, wherever it exists. Bears running twice. */
export async function removeCgroup(name: string, signal?: AbortSignal): Promise<void> {
  const deadline = Date.now() + REMOVE_TIMEOUT_MS;
  for (const hierarchy of await findHierarchies()) {
    await removeDirectory(directoryOf(hierarchy, name), deadline, signal);
  }
}

/** Names of all groups that begin with `prefix`, such as `rookery-1a2b3c4d/`: for recovery. */
export async function listOwnedCgroups(prefix: string): Promise<string[]> {
  const parent = prefix.includes("/") ? dirname(`${prefix}x`) : "";
  const found = new Set<string>();
  for (const hierarchy of await findHierarchies()) {
    const directory = parent === "" ? hierarchy.mountPoint : directoryOf(hierarchy, parent);
    for (const child of await childGroups(directory)) {
      const name = parent === "" ? child : `${parent}/${child}`;
      if (name.startsWith(prefix)) found.add(name);
    }
  }
  return [...found].sort();
}

export interface CgroupProbe {
  /** True when every limit can be kept. */
  ok: boolean;
  version: "v1" | "v2" | "hybrid" | "none";
  controllers: readonly string[];
  /** What is missing and what to do about it. */
  reason?: string;
}

/** Makes and removes a real group, since only that tells what is delegated to us. */
export async function probeCgroups(): Promise<CgroupProbe> {
  const hierarchies = await findHierarchies();
  const versions = new Set(hierarchies.map((hierarchy) => hierarchy.version));
  const version = versions.size === 2 ? "hybrid" : versions.has(2) ? "v2" : versions.has(1) ? "v1" : "none";
  const controllers = hierarchies.flatMap((hierarchy) => hierarchy.controllers);
  const missing = CONTROLLERS.filter((controller) => !controllers.includes(controller));
  const name = `rookery-probe-${process.pid}`;
  try {
    await makeCgroup(name, { memoryBytes: 64 << 20, pids: 16 });
  } catch (cause) {
    const why = isErrno(cause, "EACCES", "EPERM", "EROFS")
      ? "run the agent as root, with /sys/fs/cgroup writable"
      : "on v2 the group above it must have no processes of its own, or the agent needs a delegated one";
    return {
      ok: false,
      version,
      controllers: [],
      reason: `no cgroup can be made here (${messageOf(cause)}): ${why}. Sandboxes have no host-side limits until then`,
    };
  } finally {
    await removeCgroup(name);
  }
  if (missing.length === 0) return { ok: true, version, controllers };
  return {
    ok: false,
    version,
    controllers,
    reason: `the kernel's cgroups lack ${missing.join(", ")} here, so those limits are not kept: mount /sys/fs/cgroup, or enable them at boot`,
  };
}

/** "optional": swap accounting is a boot option. */
type LimitFile = [file: string, value: string, need?: "optional"];

function limitFiles(version: 1 | 2, controller: Controller, limits: CgroupLimits): LimitFile[] {
  const { memoryBytes, pids, cpuWeight = DEFAULT_WEIGHT, cpuQuotaCores } = limits;
  const quota = cpuQuotaCores === undefined ? undefined : Math.ceil(cpuQuotaCores * CPU_PERIOD_US);
  const v1: Record<Controller, LimitFile[]> = {
    memory: [
      // The sum is never below memory alone: lifted first, so that a greater limit can replace a smaller.
      ["memory.memsw.limit_in_bytes", "-1", "optional"],
      ["memory.limit_in_bytes", `${memoryBytes}`],
      ["memory.memsw.limit_in_bytes", `${memoryBytes}`, "optional"],
    ],
    pids: [["pids.max", `${pids}`]],
    cpu: [
      ["cpu.shares", `${Math.round((cpuWeight * DEFAULT_SHARES) / DEFAULT_WEIGHT)}`],
      ["cpu.cfs_period_us", `${CPU_PERIOD_US}`],
      ["cpu.cfs_quota_us", `${quota ?? -1}`],
    ],
  };
  const v2: Record<Controller, LimitFile[]> = {
    memory: [
      ["memory.max", `${memoryBytes}`],
      // v2 has no bound on the sum, so that swap would be a second allowance.
      ["memory.swap.max", "0", "optional"],
    ],
    pids: [["pids.max", `${pids}`]],
    cpu: [
      ["cpu.weight", `${cpuWeight}`],
      ["cpu.max", `${quota ?? "max"} ${CPU_PERIOD_US}`],
    ],
  };
  return (version === 2 ? v2 : v1)[controller];
}

/** On v2 a controller reaches a group only if every group above it hands it down. */
async function delegateControllers(hierarchy: Hierarchy, name: string): Promise<void> {
  const enable = hierarchy.controllers.map((controller) => `+${controller}`).join(" ");
  let directory = hierarchy.mountPoint;
  for (const segment of name.split("/")) {
    await writeFile(join(directory, "cgroup.subtree_control"), enable, { flag: "r+" });
    directory = join(directory, segment);
    await mkdir(directory, { recursive: true });
  }
}

async function removeDirectory(
  directory: string,
  deadline: number,
  signal: AbortSignal | undefined,
): Promise<void> {
  for (;;) {
    for (const child of await childGroups(directory)) {
      await removeDirectory(join(directory, child), deadline, signal);
    }
    const left = await killAll(directory);
    try {
      await rmdir(directory);
      return;
    } catch (cause) {
      if (isErrno(cause, "ENOENT")) return;
      if (!isErrno(cause, "EBUSY")) throw cause;
      if (Date.now() > deadline) {
        throw new Error(`cgroup ${directory}: processes ${left.join(", ")} do not end`, { cause });
      }
    }
    await delay(REMOVE_POLL_MS, undefined, { signal });
  }
}

/** SIGKILL to all in the group itself; gives back who that was. */
async function killAll(directory: string): Promise<number[]> {
  const text = await readFile(join(directory, "cgroup.procs"), "utf8").catch((cause: unknown) => {
    if (isErrno(cause, "ENOENT", "ENODEV")) return "";
    throw cause;
  });
  const pids = text.split("\n").filter(Boolean).map(Number);
  for (const pid of pids) {
    try {
      process.kill(pid, "SIGKILL");
    } catch (cause) {
      if (!isErrno(cause, "ESRCH")) throw cause;
    }
  }
  return pids;
}

async function childGroups(directory: string): Promise<string[]> {
  try {
    const entries = await readdir(directory, { withFileTypes: true });
    return entries.filter((entry) => entry.isDirectory()).map((entry) => entry.name);
  } catch (cause) {
    if (isErrno(cause, "ENOENT", "ENODEV")) return [];
    throw cause;
  }
}

async function readOomKills(hierarchies: readonly Hierarchy[], name: string): Promise<number> {
  const hierarchy = hierarchies.find(({ controllers }) => controllers.includes("memory"));
  if (hierarchy === undefined) return 0;
  const file = hierarchy.version === 2 ? "memory.events" : "memory.oom_control";
  const text = await readFile(join(directoryOf(hierarchy, name), file), "utf8");
  return Number(/^oom_kill (\d+)$/m.exec(text)?.[1] ?? 0);
}

function directoryOf(hierarchy: Hierarchy, name: string): string {
  if (!/^[A-Za-z0-9][\w.-]*(\/[A-Za-z0-9][\w.-]*)*$/.test(name))
    throw new Error(`not a cgroup name: ${name}`);
  return join(hierarchy.mountPoint, name);
}

/** Mounts do not change while an agent runs, but a few reads cost less than a stale answer. */
async function findHierarchies(): Promise<Hierarchy[]> {
  const mounts = parseCgroupMounts(await readFile("/proc/self/mountinfo", "utf8"));
  const found: Hierarchy[] = mounts.v1.flatMap(({ mountPoint, options }) => {
    const controllers = CONTROLLERS.filter((controller) => options.includes(controller));
    return controllers.length === 0 ? [] : [{ version: 1, mountPoint, controllers }];
  });
  if (mounts.v2 !== undefined) {
    const taken = new Set(found.flatMap((hierarchy) => hierarchy.controllers));
    const offered = (await readFile(join(mounts.v2, "cgroup.controllers"), "utf8")).trim().split(" ");
    const controllers = CONTROLLERS.filter((name) => offered.includes(name) && !taken.has(name));
    if (controllers.length > 0) found.push({ version: 2, mountPoint: mounts.v2, controllers });
  }
  return found;
}

/** proc_pid_mountinfo(5): `ID PARENT DEV ROOT MOUNTPOINT OPTIONS [FIELDS…] - TYPE SOURCE SUPEROPTIONS`. */
export function parseCgroupMounts(mountinfo: string): {
  v1: { mountPoint: string; options: string[] }[];
  v2: string | undefined;
} {
  const v1: { mountPoint: string; options: string[] }[] = [];
  let v2: string | undefined;
  for (const line of mountinfo.split("\n")) {
    const [before = "", after = ""] = line.split(" - ");
    const mountPoint = before.split(" ")[4];
    const [type, , options = ""] = after.split(" ");
    if (mountPoint === undefined) continue;
    if (type === "cgroup") v1.push({ mountPoint, options: options.split(",") });
    if (type === "cgroup2") v2 ??= mountPoint;
  }
  return { v1, v2 };
}

function messageOf(cause: unknown): string {
  return cause instanceof Error ? cause.message : String(cause);
}
