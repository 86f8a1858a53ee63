/**
 * Running one short-lived program of the host: argv only, never a shell.
 *
 * Invariants: the program is dead when the promise settles (it leads a process
 * group of its own, which is killed as a whole); time and output have a bound.
 */
import { spawn } from "node:child_process";
import { isErrno } from "./errno.ts";

/** How much of stderr an error quotes. */
const STDERR_TAIL_CHARS = 2000;
/** A descendant that keeps our pipes open after the program's end is not waited for longer than this. */
const PIPE_GRACE_MS = 1000;

export interface RunOptions {
  signal?: AbortSignal;
  /** Written to stdin, which is closed then; without it stdin is /dev/null. */
  input?: string | Uint8Array;
  timeoutMs?: number;
  /** Bound on stdout and on stderr, each. */
  maxOutputBytes?: number;
  okExitCodes?: readonly number[];
  /** Added to the agent's own environment; LC_ALL is C unless given. */
  env?: Readonly<Record<string, string>>;
  /** Where the program starts; the agent's own unless given. */
  cwd?: string;
}

export interface RunResult {
  stdout: string;
  stderr: string;
  exitCode: number;
}

/** A program that could not be started, or ended other than it should. */
export class CommandError extends Error {
  override readonly name = "CommandError";
  readonly argv: readonly string[];
  /** Undefined when it did not run to its end: not found, killed, timed out. */
  readonly exitCode: number | undefined;
  readonly stderr: string;

  constructor(
    message: string,
    facts: { argv: readonly string[]; exitCode?: number; stderr?: string; cause?: unknown },
  ) {
    super(message, facts.cause === undefined ? undefined : { cause: facts.cause });
    this.argv = facts.argv;
    this.exitCode = facts.exitCode;
    this.stderr = facts.stderr ?? "";
  }
}

/**
 * Runs `argv` to its end. Throws a CommandError, or `signal.reason` when
 * `signal` aborts, in either case only after the program is gone.
 */
export async function run(
  argv: readonly [string, ...string[]],
  options: RunOptions = {},
): Promise<RunResult> {
  const {
    signal,
    input,
    timeoutMs = 30_000,
    maxOutputBytes = 1 << 20,
    okExitCodes = [0],
    env,
    cwd,
  } = options;
  signal?.throwIfAborted();
  const [program, ...args] = argv;
  const child = spawn(program, args, {
    stdio: [input === undefined ? "ignore" : "pipe", "pipe", "pipe"],
    env: { ...process.env, LC_ALL: "C", ...env },
    cwd,
    detached: true,
  });

  const killGroup = (): void => {
    // Once reaped, its pid may be another's.
    if (child.pid === undefined || child.exitCode !== null || child.signalCode !== null) return;
    try {
      process.kill(-child.pid, "SIGKILL");
    } catch (cause) {
      if (!isErrno(cause, "ESRCH")) throw cause;
    }
  };

  let failure: { kind: "aborted" } | { kind: "failed"; message: string } | undefined;
  const fail = (reason: NonNullable<typeof failure>): void => {
    failure ??= reason;
    killGroup();
  };
  const collect = (name: "stdout" | "stderr"): (() => string) => {
    const chunks: Buffer[] = [];
    let bytes = 0;
    child[name]?.on("data", (chunk: Buffer) => {
      bytes += chunk.length;
      if (bytes > maxOutputBytes) {
        fail({ kind: "failed", message: `wrote more than ${maxOutputBytes} bytes to ${name}` });
      } else {
        chunks.push(chunk);
      }
    });
    return () => Buffer.concat(chunks).toString("utf8");
  };
  const stdout = collect("stdout");
  const stderr = collect("stderr");

  const onAbort = (): void => fail({ kind: "aborted" });
  signal?.addEventListener("abort", onAbort, { once: true });
  const deadline = setTimeout(
    () => fail({ kind: "failed", message: `did not end within ${timeoutMs} ms` }),
    timeoutMs,
  );
  let pipeGrace: NodeJS.Timeout | undefined;
  child.once("exit", () => {
    clearTimeout(deadline);
    pipeGrace = setTimeout(() => {
      child.stdout?.destroy();
      child.stderr?.destroy();
    }, PIPE_GRACE_MS);
  });
  // A program may end without reading its input: its exit code says whether that was right.
  child.stdin?.on("error", () => undefined);
  if (input !== undefined) child.stdin?.end(input);

  try {
    const exitCode = await new Promise<number | NodeJS.Signals>((resolve, reject) => {
      child.once("error", (cause) =>
        reject(new CommandError(`${program}: could not be started: ${cause.message}`, { argv, cause })),
      );
      child.once("close", (code, killedBy) => resolve(code ?? killedBy ?? "SIGKILL"));
    });
    if (failure?.kind === "aborted") throw signal?.reason;
    const quoted = stderr().trim().slice(-STDERR_TAIL_CHARS);
    const tail = quoted === "" ? "" : `: ${quoted}`;
    if (failure !== undefined) {
      throw new CommandError(`${program}: ${failure.message}${tail}`, { argv, stderr: quoted });
    }
    if (typeof exitCode === "string") {
      throw new CommandError(`${program}: was ended by ${exitCode}${tail}`, { argv, stderr: quoted });
    }
    if (!okExitCodes.includes(exitCode)) {
      throw new CommandError(`${program}: exit code ${exitCode}${tail}`, { argv, exitCode, stderr: quoted });
    }
    return { stdout: stdout(), stderr: stderr(), exitCode };
  } finally {
    clearTimeout(deadline);
    clearTimeout(pipeGrace);
    signal?.removeEventListener("abort", onAbort);
  }
}
