/**
 * The cgroup of user processes, so that a fork bomb or a memory hog leaves
 * envd answering.
 *
 * Children are born in it (system/launcher.ts): one that is moved after its
 * start has a moment in which what it forks escapes. As a cgroup it also gets
 * no more of the CPU than envd, which has the root cgroup's share for itself,
 * however many its processes are.
 */
import { constants, existsSync, mkdirSync, openSync, readFileSync, writeFileSync } from "node:fs";

const MOUNT = "/sys/fs/cgroup";
const USER_CGROUP = `${MOUNT}/user`;
/**
 * What users cannot have: envd's anonymous memory (about 40 MiB under load)
 * and its text (some 30 MiB of Node's that must stay cached to answer fast).
 */
const RESERVED_BYTES = 80 * 1024 * 1024;
/** Of a small guest users get half, whatever envd needs. */
const MIN_USER_SHARE = 0.5;
/**
 * A task costs the kernel about 16 KiB (stack and task_struct) that memory.max
 * counts, but its limit comes late: 8,192 tasks are 128 MiB. Room for a build
 * with thousands of processes, not for a bomb that makes the scheduler crawl.
 */
const MAX_TASKS = 4096;

export interface UserCgroup {
  /** Its folder; undefined where cgroup v2 is absent (tests on a host). */
  readonly fd: number | undefined;
  /** Why there is none, for the log. */
  readonly absence: string | undefined;
}

export function openUserCgroup(): UserCgroup {
  if (!existsSync(`${MOUNT}/cgroup.controllers`)) {
    return { fd: undefined, absence: `no cgroup v2 at ${MOUNT}` };
  }
  // Idempotent: init may have enabled them, and an envd that crashed made the cgroup.
  for (const controller of ["cpu", "memory", "pids"]) {
    writeFileSync(`${MOUNT}/cgroup.subtree_control`, `+${controller}`);
  }
  mkdirSync(USER_CGROUP, { recursive: true });
  const total = totalMemory();
  const max = Math.max(total - RESERVED_BYTES, Math.floor(total * MIN_USER_SHARE));
  writeFileSync(`${USER_CGROUP}/memory.max`, String(max));
  writeFileSync(`${USER_CGROUP}/pids.max`, String(MAX_TASKS));
  return { fd: openSync(USER_CGROUP, constants.O_RDONLY | constants.O_DIRECTORY), absence: undefined };
}

function totalMemory(): number {
  const kib = /^MemTotal:\s+(\d+) kB$/m.exec(readFileSync("/proc/meminfo", "utf8"))?.[1];
  if (kib === undefined) throw new Error("/proc/meminfo names no MemTotal");
  return Number(kib) * 1024;
}
