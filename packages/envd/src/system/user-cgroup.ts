/**
 * The cgroup of user processes, so that a fork bomb or a memory hog leaves
 * envd answering.
 *
 * Children are born in it. Neither libuv nor Node can clone into a cgroup, and
 * moving a child after its start leaves it a moment in which what it forks
 * escapes. So envd itself enters the cgroup, forks, and leaves: two writes,
 * and no shell between us and the command whose exec could fail unseen.
 * `favordynmods` spares each of the writes an RCU grace period (10 ms and
 * more); forks pay a few nanoseconds for it.
 *
 * Where cgroup v2 is absent (tests on a host) `join` only calls its argument.
 */
import { existsSync, mkdirSync, openSync, readFileSync, writeFileSync, writeSync } from "node:fs";
import { systemMessage } from "../errors.ts";
import type { Native } from "./native.ts";

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
  /** Why there is none, for the log. */
  readonly absence: string | undefined;
  /** Runs `fork` with this process in the cgroup. */
  join<T>(fork: () => T): T;
}

export function openUserCgroup(native: Native, log: (message: string) => void): UserCgroup {
  if (!existsSync(`${MOUNT}/cgroup.controllers`)) {
    return { absence: `no cgroup v2 at ${MOUNT}`, join: (fork) => fork() };
  }
  const own = /^0::(.*)$/m.exec(readFileSync("/proc/self/cgroup", "utf8"))?.[1];
  if (own === undefined) return { absence: "this process is in no cgroup v2", join: (fork) => fork() };
  if (own === "/user") throw new Error("envd was started in the cgroup of user processes");
  try {
    native.remount(MOUNT, "nsdelegate,favordynmods");
  } catch (error) {
    log(`cgroup: favordynmods is not to be had: ${systemMessage(error)}`);
  }
  // Idempotent: init may have enabled them, and a crashed envd made the cgroup.
  for (const controller of ["memory", "pids"]) {
    writeFileSync(`${MOUNT}/cgroup.subtree_control`, `+${controller}`);
  }
  mkdirSync(USER_CGROUP, { recursive: true });
  const total = totalMemory();
  const max = Math.max(total - RESERVED_BYTES, Math.floor(total * MIN_USER_SHARE));
  writeFileSync(`${USER_CGROUP}/memory.max`, String(max));
  writeFileSync(`${USER_CGROUP}/pids.max`, String(MAX_TASKS));

  const inside = openSync(`${USER_CGROUP}/cgroup.procs`, "w");
  const outside = openSync(`${MOUNT}${own}/cgroup.procs`, "w");
  return {
    absence: undefined,
    join(fork) {
      // "0" is the process that writes, with all its threads.
      writeSync(inside, "0", 0);
      try {
        return fork();
      } finally {
        writeSync(outside, "0", 0);
      }
    },
  };
}

function totalMemory(): number {
  const kib = /^MemTotal:\s+(\d+) kB$/m.exec(readFileSync("/proc/meminfo", "utf8"))?.[1];
  if (kib === undefined) throw new Error("/proc/meminfo names no MemTotal");
  return Number(kib) * 1024;
}
