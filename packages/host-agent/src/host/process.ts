/**
 * Processes by pid and start time: the pair names one process for good, while
 * a pid alone is reused.
 */
import { readFileSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { setTimeout as delay } from "node:timers/promises";
import { isErrno } from "./errno.ts";

export interface ProcessIdentity {
  pid: number;
  /** Field 22 of /proc/PID/stat, in clock ticks since boot. */
  startTime: string;
}

interface ProcessStat {
  state: string;
  startTime: string;
}

function parseStat(pid: number, text: string): ProcessStat {
  // The second field, the name, may hold blanks and parentheses; fields count from after its last one.
  const fields = text.slice(text.lastIndexOf(")") + 2).split(" ");
  const [state, startTime] = [fields[0], fields[19]];
  if (state === undefined || startTime === undefined) throw new Error(`/proc/${pid}/stat is not understood`);
  return { state, startTime };
}

async function readStat(pid: number): Promise<ProcessStat | undefined> {
  try {
    return parseStat(pid, await readFile(`/proc/${pid}/stat`, "utf8"));
  } catch (error) {
    if (isErrno(error, "ENOENT", "ESRCH")) return undefined;
    throw error;
  }
}

/** The process that bears the pid now; undefined when there is none, or only a zombie. */
export async function identifyProcess(pid: number): Promise<ProcessIdentity | undefined> {
  const stat = await readStat(pid);
  return stat === undefined || stat.state === "Z" || stat.state === "X"
    ? undefined
    : { pid, startTime: stat.startTime };
}

/**
 * A child that was spawned in this turn of the event loop: it is there, at least
 * as a zombie, because Node has had no occasion yet to reap it.
 */
export function identifyChild(pid: number): ProcessIdentity {
  return { pid, startTime: parseStat(pid, readFileSync(`/proc/${pid}/stat`, "utf8")).startTime };
}

/** A zombie is not alive: its memory, files and namespaces are gone. */
export async function isAlive(identity: ProcessIdentity): Promise<boolean> {
  return (await identifyProcess(identity.pid))?.startTime === identity.startTime;
}

/** Sends a signal if the process is still that one. Tells whether it was. */
export async function signalProcess(identity: ProcessIdentity, name: NodeJS.Signals): Promise<boolean> {
  if (!(await isAlive(identity))) return false;
  try {
    process.kill(identity.pid, name);
    return true;
  } catch (error) {
    if (isErrno(error, "ESRCH")) return false;
    throw error;
  }
}

const POLL_MS = 5;

/** Waits until the process is gone; false when `timeoutMs` passed first. */
export async function waitUntilGone(
  identity: ProcessIdentity,
  options: { timeoutMs: number; signal?: AbortSignal },
): Promise<boolean> {
  const end = performance.now() + options.timeoutMs;
  while (await isAlive(identity)) {
    if (performance.now() >= end) return false;
    await delay(POLL_MS, undefined, options.signal === undefined ? {} : { signal: options.signal });
  }
  return true;
}
