/**
 * A process from its start to the end of its output.
 *
 * The end is told when the program has exited and all that it had written is
 * read; not at the end of file, which a descendant that holds the pipe (a
 * server started in the background) puts off for ever. From then on its output
 * is read and dropped, so that the descendant is neither stopped nor killed by
 * a pipe without a reader.
 *
 * Invariant: `onEnd` is called once, after the last output event.
 */
import { errnoOf } from "../errors.ts";
import { MAX_ORPHAN_PIPES, MAX_PENDING_INPUT_BYTES } from "../limits.ts";
import type { Native } from "../system/native.ts";
import { describeExit } from "./exit-status.ts";
import type { Reaper } from "./reaper.ts";
import type { OutputPipe, Program } from "./spawn.ts";
import { Subscription } from "./subscription.ts";
import type { OutputName, ProcessEnd } from "./subscription.ts";

export class InputError extends Error {
  override readonly name = "InputError";
}

export interface ProcessFacts {
  command: string;
  args: readonly string[];
  envs: Readonly<Record<string, string>>;
  cwd: string | undefined;
  tag: string | undefined;
}

let orphanPipes = 0;

export class RunningProcess {
  readonly pid: number;
  readonly facts: ProcessFacts;
  readonly #native: Native;
  readonly #program: Program;
  readonly #outputs: readonly OutputPipe[];
  readonly #subscriptions = new Set<Subscription>();
  readonly #onEnd: (process: RunningProcess, end: ProcessEnd) => void;
  #deadline: NodeJS.Timeout | undefined;
  #exit: ProcessEnd | undefined;
  #ended = false;
  #timedOut = false;

  constructor(options: {
    facts: ProcessFacts;
    program: Program;
    native: Native;
    reaper: Reaper;
    timeoutMs: number | undefined;
    onEnd: (process: RunningProcess, end: ProcessEnd) => void;
  }) {
    const { facts, program, native, reaper, timeoutMs, onEnd } = options;
    this.pid = program.pid;
    this.facts = facts;
    this.#native = native;
    this.#program = program;
    this.#onEnd = onEnd;
    this.#outputs = [program.stdout, program.stderr];
    this.#read("stdout", program.stdout);
    this.#read("stderr", program.stderr);
    // A program that closes its input is no error of ours; who writes learns it from `writeInput`.
    program.stdin?.on("error", () => program.stdin?.destroy());
    reaper.onExit(program.pid, (exit) => {
      clearTimeout(this.#deadline);
      this.#exit = describeExit(exit);
      program.stdin?.destroy();
      this.#endIfDrained();
    });
    if (timeoutMs !== undefined) {
      this.#deadline = setTimeout(() => {
        this.#timedOut = true;
        this.kill("SIGKILL");
      }, timeoutMs);
    }
  }

  /** Its deadline ended it. */
  get timedOut(): boolean {
    return this.#timedOut;
  }

  get subscribers(): number {
    return this.#subscriptions.size;
  }

  /** Output from now on, and the end. Must be closed by `unsubscribe`. */
  subscribe(): Subscription {
    const subscription = new Subscription(() => this.#flow());
    this.#subscriptions.add(subscription);
    return subscription;
  }

  unsubscribe(subscription: Subscription): void {
    this.#subscriptions.delete(subscription);
    this.#flow();
  }

  /** Signals the whole process group. False when there is none any more. */
  kill(signal: "SIGKILL" | "SIGTERM"): boolean {
    // After the exit the number may be another group's.
    if (this.#exit !== undefined) return false;
    try {
      return process.kill(-this.pid, signal);
    } catch (error) {
      if (errnoOf(error) === "ESRCH") return false;
      throw error;
    }
  }

  /** Resolves when the pipe has taken the data, or when `signal` aborts. */
  async writeInput(data: Uint8Array, signal: AbortSignal): Promise<void> {
    const stdin = this.#program.stdin;
    if (stdin === undefined || stdin.destroyed || stdin.writableEnded) {
      throw new InputError("stdin not enabled or closed");
    }
    if (stdin.writableLength + data.byteLength > MAX_PENDING_INPUT_BYTES) {
      throw new InputError("the process does not read its input");
    }
    signal.throwIfAborted();
    await new Promise<void>((resolve, reject) => {
      const abort = () => reject(signal.reason);
      signal.addEventListener("abort", abort, { once: true });
      stdin.write(data, (error) => {
        signal.removeEventListener("abort", abort);
        if (error) reject(new InputError("the process closed its input", { cause: error }));
        else resolve();
      });
    });
  }

  closeInput(): void {
    this.#program.stdin?.end();
  }

  #read(from: OutputName, { socket }: OutputPipe): void {
    socket.on("data", (data: Buffer) => {
      if (this.#ended) return;
      for (const subscription of this.#subscriptions) subscription.push({ kind: "output", from, data });
      if (this.#isFull()) for (const output of this.#outputs) output.socket.pause();
      this.#endIfDrained();
    });
    socket.on("error", () => socket.destroy());
    // Comes after the end of file as well as after an error.
    socket.once("close", () => this.#endIfDrained());
  }

  #isFull(): boolean {
    for (const subscription of this.#subscriptions) if (subscription.full) return true;
    return false;
  }

  #flow(): void {
    if (this.#isFull()) return;
    for (const { socket } of this.#outputs) if (socket.isPaused()) socket.resume();
  }

  #endIfDrained(): void {
    if (this.#ended || this.#exit === undefined) return;
    for (const { fd, socket } of this.#outputs) {
      // Destroyed, its descriptor may be another file's already.
      if (socket.destroyed) continue;
      // At the end of file there is nothing to read either; "close" only comes later.
      if (socket.readableLength > 0 || this.#native.unreadBytes(fd) > 0) return;
    }
    this.#ended = true;
    for (const output of this.#outputs) abandon(output);
    for (const subscription of this.#subscriptions) subscription.push({ kind: "end", end: this.#exit });
    this.#onEnd(this, this.#exit);
  }
}

/** Reads on, drops it, until the last holder of the other end is gone. */
function abandon({ socket }: OutputPipe): void {
  if (socket.destroyed) return;
  if (orphanPipes >= MAX_ORPHAN_PIPES) {
    socket.destroy();
    return;
  }
  orphanPipes += 1;
  socket.once("close", () => (orphanPipes -= 1));
  socket.resume();
}
