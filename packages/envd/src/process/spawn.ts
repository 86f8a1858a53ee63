/**
 * Starting one program as a user, without a shell in between.
 *
 * The child is the leader of its own session and process group, is born in the
 * cgroup of user processes, has an ordinary OOM score, and has pipes: not
 * Node's socket pairs, because `echo x >/dev/stderr` fails on a socket.
 */
import { spawn } from "node:child_process";
import type { ChildProcess } from "node:child_process";
import { closeSync, fchownSync } from "node:fs";
import { Socket } from "node:net";
import { once } from "node:events";
import type { Native } from "../system/native.ts";
import type { OomScore } from "../system/oom-score.ts";
import type { UserCgroup } from "../system/user-cgroup.ts";
import type { User } from "../system/users.ts";

export interface SpawnDeps {
  native: Native;
  cgroup: UserCgroup;
  oomScore: OomScore;
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

export interface Program {
  pid: number;
  child: ChildProcess;
  stdin: Socket | undefined;
  stdout: OutputPipe;
  stderr: OutputPipe;
}

/** Rejects with the system's error when the program cannot be executed. */
export async function startProgram(spec: ProgramSpec, deps: SpawnDeps): Promise<Program> {
  const { native, cgroup, oomScore } = deps;
  const pipes: { readFd: number; writeFd: number }[] = [];
  const open = () => {
    const pipe = native.pipe();
    pipes.push(pipe);
    // To open /dev/stderr is to open the pipe's inode, which is root's at first.
    if (spec.user.uid !== 0) fchownSync(pipe.readFd, spec.user.uid, spec.user.gid);
    return pipe;
  };
  let child: ChildProcess;
  let input: { readFd: number; writeFd: number } | undefined;
  let output: { readFd: number; writeFd: number };
  let errors: { readFd: number; writeFd: number };
  try {
    input = spec.stdin ? open() : undefined;
    output = open();
    errors = open();
    const fork = () =>
      spawn(spec.command, spec.args, {
        cwd: spec.cwd,
        env: spec.env,
        uid: spec.user.uid,
        detached: true,
        stdio: [input?.readFd ?? "ignore", output.writeFd, errors.writeFd],
      });
    child = oomScore.lend(() => cgroup.join(() => native.asUser(spec.user, fork)));
    if (child.pid === undefined) throw (await once(child, "error"))[0];
  } catch (error) {
    for (const { readFd, writeFd } of pipes) {
      closeSync(readFd);
      closeSync(writeFd);
    }
    throw error;
  }
  closeSync(output.writeFd);
  closeSync(errors.writeFd);
  if (input !== undefined) closeSync(input.readFd);
  return {
    pid: child.pid,
    child,
    stdin: input && new Socket({ fd: input.writeFd, readable: false, writable: true }),
    stdout: readingEnd(output.readFd),
    stderr: readingEnd(errors.readFd),
  };
}

function readingEnd(fd: number): OutputPipe {
  return { fd, socket: new Socket({ fd, readable: true, writable: false }) };
}
