/**
 * Starting one program as a user, without a shell in between.
 *
 * The child is the leader of its own session and process group, is born in the
 * cgroup of user processes, has an ordinary OOM score and nothing of envd's
 * open, and has pipes: not socket pairs as Node makes them, because
 * `echo x >/dev/stderr` fails on a socket.
 */
import { accessSync, closeSync, constants, fchownSync, openSync, statSync } from "node:fs";
import { Socket } from "node:net";
import { posix } from "node:path";
import { getSystemErrorName } from "node:util";
import { MAX_LAUNCHES } from "../limits.ts";
import type { LaunchSpec } from "../system/launcher.ts";
import type { Native } from "../system/native.ts";
import type { OomScore } from "../system/oom-score.ts";
import type { UserCgroup } from "../system/user-cgroup.ts";
import type { User } from "../system/users.ts";
import type { Reaper } from "./reaper.ts";

export interface SpawnDeps {
  native: Native;
  cgroup: UserCgroup;
  oomScore: OomScore;
  reaper: Reaper;
}

export interface ProgramSpec {
  command: string;
  args: readonly string[];
  env: Readonly<Record<string, string>>;
  cwd: string;
  user: User;
  /** Otherwise it reads from /dev/null. */
  stdin: boolean;
}

/** The reading end of a pipe, with the number that the kernel knows it by. */
export interface OutputPipe {
  fd: number;
  socket: Socket;
}

/** Its exit is the reaper's to tell. */
export interface Program {
  pid: number;
  stdin: Socket | undefined;
  stdout: OutputPipe;
  stderr: OutputPipe;
}

/** `code` is the system's; `what` says which part of the request was at fault. */
export class StartError extends Error {
  override readonly name = "StartError";
  readonly code: string;
  readonly what: "system" | "cwd" | "program";

  constructor(code: string, what: StartError["what"]) {
    super(`${code} (${what})`);
    this.code = code;
    this.what = what;
  }
}

/** Rejects with a StartError when the program cannot be executed. */
export async function startProgram(spec: ProgramSpec, deps: SpawnDeps): Promise<Program> {
  const { native } = deps;
  const paths = candidatesOf(spec);
  // Ours and the child's ends; each is closed or handed over below.
  const ours: number[] = [];
  const theirs: number[] = [];
  const openPipe = (): { readFd: number; writeFd: number } => {
    const pipe = native.pipe();
    // To open /dev/stderr is to open the pipe's inode, which is root's at first.
    if (spec.user.uid !== 0) fchownSync(pipe.readFd, spec.user.uid, spec.user.gid);
    return pipe;
  };
  let pid: number;
  try {
    if (spec.stdin) {
      const { readFd, writeFd } = openPipe();
      theirs.push(readFd);
      ours.push(writeFd);
    } else theirs.push(openSync("/dev/null", "r"));
    for (let output = 0; output < 2; output += 1) {
      const { readFd, writeFd } = openPipe();
      theirs.push(writeFd);
      ours.push(readFd);
    }
    pid = await launchFirst(paths, spec, [theirs[0]!, theirs[1]!, theirs[2]!], deps);
  } catch (error) {
    for (const fd of ours) closeSync(fd);
    throw error;
  } finally {
    for (const fd of theirs) closeSync(fd);
  }
  const stdin = spec.stdin ? ours.shift() : undefined;
  return {
    pid,
    stdin: stdin === undefined ? undefined : new Socket({ fd: stdin, readable: false, writable: true }),
    stdout: readingEnd(ours[0]!),
    stderr: readingEnd(ours[1]!),
  };
}

function readingEnd(fd: number): OutputPipe {
  return { fd, socket: new Socket({ fd, readable: true, writable: false }) };
}

/** Where the command may lie, as execvp looks for it: in the child's PATH, not in ours. */
function candidatesOf({ command, env, cwd }: ProgramSpec): string[] {
  if (command.includes("/")) return [command];
  return (env["PATH"] ?? "")
    .split(":")
    .map((folder) => posix.join(folder === "" ? "." : folder, command))
    .filter((path) => isProgram(posix.resolve(cwd, path)));
}

function isProgram(path: string): boolean {
  try {
    accessSync(path, constants.X_OK);
    return statSync(path).isFile();
  } catch {
    // Whatever the reason, it is no program that we could start.
    return false;
  }
}

async function launchFirst(
  paths: readonly string[],
  spec: ProgramSpec,
  stdio: LaunchSpec["stdio"],
  deps: SpawnDeps,
): Promise<number> {
  let failure = new StartError("ENOENT", "program");
  for (const path of paths) {
    try {
      return await launch({ path, argv: [spec.command, ...spec.args] }, spec, stdio, deps);
    } catch (error) {
      if (!(error instanceof StartError)) throw error;
      failure = error;
      if (error.code === "ENOEXEC") {
        // A script without "#!": execvp gives it to the shell, and so do we.
        return launch({ path: "/bin/sh", argv: ["/bin/sh", path, ...spec.args] }, spec, stdio, deps);
      }
      // What the user may not execute, another folder of PATH may hold once more.
      if (error.what !== "program" || error.code !== "EACCES") break;
    }
  }
  throw failure;
}

async function launch(
  program: { path: string; argv: readonly string[] },
  { env, cwd, user }: ProgramSpec,
  stdio: LaunchSpec["stdio"],
  { native, cgroup, oomScore, reaper }: SpawnDeps,
): Promise<number> {
  const { pid, failure } = await inTurn(() =>
    native.launch({
      ...program,
      env,
      cwd,
      uid: user.uid,
      gid: user.gid,
      groups: user.groups,
      stdio,
      cgroupFd: cgroup.fd,
      oomScore: oomScore.ofChildren,
    }),
  );
  if (failure === undefined) return pid;
  if (pid > 0) reaper.onExit(pid, () => undefined);
  const what = failure.call === "chdir" ? "cwd" : failure.call === "execve" ? "program" : "system";
  throw new StartError(getSystemErrorName(-failure.errno), what);
}

let launching = 0;
const queue: (() => void)[] = [];

/** libuv's pool has four threads. Children that get no CPU must not take them all from the files. */
async function inTurn<T>(task: () => Promise<T>): Promise<T> {
  if (launching >= MAX_LAUNCHES) await new Promise<void>((resolve) => queue.push(resolve));
  else launching += 1;
  try {
    return await task();
  } finally {
    const next = queue.shift();
    if (next === undefined) launching -= 1;
    else next();
  }
}
