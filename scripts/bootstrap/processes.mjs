/**
 * The product's long-lived processes: started in a session of their own, named
 * by a pid file, recognised by their command line and start time, so that a pid
 * that was given to another program, or to another product's, is never signalled.
 */
import { spawn } from "node:child_process";
import { closeSync, openSync, readFileSync, renameSync, rmSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { StepError } from "./run.mjs";

/** What stands in the command line of each. */
const MARKS = { agent: "rookery-agent", "control-plane": "control-plane", postgres: "postgres" };

const MAX_LOG_BYTES = 32 << 20;

/** @param {keyof typeof MARKS} name */
export function livePid(paths, name) {
  let lines;
  try {
    lines = readFileSync(join(paths.runDir, `${name}.pid`), "utf8").split("\n");
  } catch (cause) {
    if (cause.code === "ENOENT") return undefined;
    throw cause;
  }
  const pid = Number.parseInt(lines[0], 10);
  if (!Number.isInteger(pid) || pid <= 1) return undefined;
  const startTime = startTimeOf(pid);
  const cmdline = readOfProcess(pid, "cmdline");
  if (startTime === undefined || cmdline === undefined) return undefined;
  // PostgreSQL's file, which another program writes, has no second line.
  if (lines[1] && lines[1] !== startTime) return undefined;
  // Empty for a moment while one program makes way for another (setpriv for node): the start time is enough then.
  const isMarked = cmdline.includes(MARKS[name]) || (cmdline === "" && Boolean(lines[1]));
  return isMarked ? pid : undefined;
}

/** In ticks since the boot, as proc_pid_stat(5) has it in field 22; undefined when nobody lives there. */
function startTimeOf(pid) {
  const stat = readOfProcess(pid, "stat");
  const fields = stat?.slice(stat.lastIndexOf(")") + 2).split(" ");
  return fields === undefined || fields[0] === "Z" || fields[0] === "X" ? undefined : fields[19];
}

function readOfProcess(pid, name) {
  try {
    return readFileSync(`/proc/${pid}/${name}`, "utf8");
  } catch (cause) {
    if (cause.code === "ENOENT" || cause.code === "ESRCH") return undefined;
    throw cause;
  }
}

/**
 * Starts a detached process and writes its pid file.
 * @param {{runDir: string, logDir: string}} paths
 * @param {string} name
 * @param {{argv: string[], env: NodeJS.ProcessEnv, cwd?: string, uid?: number}} options
 */
export function startDetached(paths, name, { argv, env, cwd, uid }) {
  const logFile = join(paths.logDir, `${name}.log`);
  keepLogSmall(logFile);
  const log = openSync(logFile, "a", 0o600);
  try {
    const child = spawn(argv[0], argv.slice(1), {
      cwd,
      env,
      detached: true,
      stdio: ["ignore", log, log],
      ...(uid === undefined ? {} : { uid, gid: uid }),
    });
    if (child.pid === undefined) throw new StepError(`cannot start ${name} (${argv[0]})`);
    child.unref();
    writeFileSync(join(paths.runDir, `${name}.pid`), `${child.pid}\n${startTimeOf(child.pid) ?? ""}\n`);
    return child.pid;
  } finally {
    closeSync(log);
  }
}

/** What a former process wrote is kept once, when it is long, so that logs take a bounded part of the disk. */
export function keepLogSmall(file, maxBytes = MAX_LOG_BYTES) {
  const size = statSync(file, { throwIfNoEntry: false })?.size ?? 0;
  if (size > maxBytes) renameSync(file, `${file}.1`);
}

/** Ends a process that is ours: SIGTERM, and SIGKILL when `graceMs` have passed. */
export async function stop(paths, name, graceMs) {
  const pid = livePid(paths, name);
  if (pid !== undefined) {
    process.kill(pid, "SIGTERM");
    const killAt = Date.now() + graceMs;
    while (livePid(paths, name) !== undefined) {
      if (Date.now() > killAt) process.kill(pid, "SIGKILL");
      await delay(50);
    }
  }
  rmSync(join(paths.runDir, `${name}.pid`), { force: true });
  return pid !== undefined;
}

/** Last lines of a log, for an error message. */
export function logTail(paths, name, lines = 15) {
  try {
    return readFileSync(join(paths.logDir, `${name}.log`), "utf8")
      .trimEnd()
      .split("\n")
      .slice(-lines)
      .join("\n");
  } catch (cause) {
    if (cause.code === "ENOENT") return "(no log)";
    throw cause;
  }
}

/**
 * Waits until `probe` answers something truthy, while the process lives.
 * @template T
 * @param {() => Promise<T | undefined>} probe
 * @returns {Promise<T>}
 */
export async function until(paths, name, { what, timeoutMs, probe }) {
  const giveUpAt = Date.now() + timeoutMs;
  for (;;) {
    const answer = await probe();
    if (answer) return answer;
    if (livePid(paths, name) === undefined) {
      throw new StepError(`${name} ended while waiting for ${what}. Its log:\n${logTail(paths, name)}`);
    }
    if (Date.now() > giveUpAt) {
      throw new StepError(
        `${name} did not reach ${what} in ${timeoutMs / 1000} s. Its log:\n${logTail(paths, name)}`,
      );
    }
    await delay(50);
  }
}
