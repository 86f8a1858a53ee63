/**
 * envd of simulated guests: answers from what the guest remembers, by the same
 * calls as the client of a real one, through no socket.
 *
 * A command's result follows from its text alone (simulated-commands.ts). A
 * guest whose memory and disk do not fit answers nobody, as after a kernel panic.
 */
import { RookeryError } from "@rookery/protocol/errors";
import type { EnvdTarget } from "../sandbox-manager/sandbox.ts";
import type { ProcessTable, SimulatedProcess } from "../vmm/simulated-processes.ts";
import type { CommandEvent, CommandResult } from "./commands.ts";
import type { EnvdAddress } from "./connections.ts";
import type { Guests } from "./envd-client.ts";
import type { EnvdInit } from "./envd-init.ts";
import type { FileTarget } from "./files.ts";
import { refusedToken } from "./guest-answers.ts";
import type { VmExit } from "../vmm/vmm.ts";
import type { Command } from "./process-calls.ts";
import { runSimulated } from "./simulated-commands.ts";

/** What takes a guest time. */
export type GuestOperation = "init" | "exec" | "file";

export interface SimulatedGuestsOptions {
  processes: ProcessTable;
  /** Passes the time that a guest takes; the default takes none. */
  pause?: (operation: GuestOperation, signal: AbortSignal) => Promise<void>;
  /** For `sleep` in a guest. */
  sleep?: (delayMs: number, signal: AbortSignal) => Promise<void>;
  monotonicMs?: () => number;
  /** Thrown from within an effect, where a test wants it to fail. */
  trouble?: (effect: string) => void;
  /** A guest ended by itself; the default leaves it running. */
  end?: (pid: number, exit: VmExit) => void;
}

/** Files are kept in the guest's memory: a few small ones. */
const MAX_FILE_BYTES = 128 << 10;
const MAX_FILES = 64;
const FILE = "file:";
const WORDS_OF_END = {
  guest_crashed: "Kernel panic - not syncing (simulated)",
  guest_shutdown: "the guest shut down",
} as const;

export class SimulatedGuests implements Guests {
  readonly #processes: ProcessTable;
  readonly #pause: NonNullable<SimulatedGuestsOptions["pause"]>;
  readonly #sleep: NonNullable<SimulatedGuestsOptions["sleep"]>;
  readonly #monotonicMs: () => number;
  readonly #trouble: (effect: string) => void;
  readonly #end: NonNullable<SimulatedGuestsOptions["end"]>;

  constructor(options: SimulatedGuestsOptions) {
    this.#processes = options.processes;
    this.#pause = options.pause ?? (() => Promise.resolve());
    this.#sleep = options.sleep ?? (() => Promise.resolve());
    this.#monotonicMs = options.monotonicMs ?? (() => 0);
    this.#trouble = options.trouble ?? (() => undefined);
    this.#end = options.end ?? (() => undefined);
  }

  async waitHealthy({ port }: EnvdAddress, signal: AbortSignal): Promise<void> {
    signal.throwIfAborted();
    this.#find(port);
  }

  async init({ port }: EnvdAddress, init: EnvdInit, signal: AbortSignal): Promise<void> {
    this.#trouble("guest.init");
    const { pid } = this.#find(port);
    await this.#pause("init", signal);
    const { sandboxId, hostname, machineId, restoreId, accessToken } = init;
    this.#remember(this.#same(port, pid), { sandboxId, hostname, machineId, restoreId, accessToken });
    this.#trouble("guest.inited");
  }

  async knowsToken({ port, accessToken }: EnvdTarget, signal: AbortSignal): Promise<boolean> {
    signal.throwIfAborted();
    this.#trouble("guest.knowsToken");
    return this.#find(port).guest.memory["accessToken"] === accessToken;
  }

  async exec(
    target: EnvdTarget,
    command: Command,
    { maxOutputBytes }: { maxOutputBytes: number },
    signal: AbortSignal,
  ): Promise<CommandResult> {
    const begun = this.#monotonicMs();
    const { stdout, stderr, end } = await this.#run(target, command, signal);
    return {
      stdout: stdout.subarray(0, maxOutputBytes),
      stderr: stderr.subarray(0, maxOutputBytes),
      exitCode: end.exitCode,
      signal: end.signal,
      timedOut: end.timedOut,
      truncated: stdout.length > maxOutputBytes || stderr.length > maxOutputBytes,
      durationMs: Math.round(this.#monotonicMs() - begun),
    };
  }

  async *execStream(
    target: EnvdTarget,
    command: Command,
    signal: AbortSignal,
  ): AsyncGenerator<CommandEvent, void, undefined> {
    yield { kind: "start", pid: 1 };
    const { stdout, stderr, end } = await this.#run(target, command, signal);
    if (stdout.length > 0) yield { kind: "stdout", data: stdout };
    if (stderr.length > 0) yield { kind: "stderr", data: stderr };
    yield end;
  }

  async writeFile(
    target: EnvdTarget,
    { path }: FileTarget,
    content: AsyncIterable<Uint8Array>,
    signal: AbortSignal,
  ): Promise<number> {
    const { pid } = this.#enter(target);
    const parts: Uint8Array[] = [];
    let length = 0;
    for await (const part of content) {
      length += part.byteLength;
      // Read to its end all the same: whoever sends it waits for that.
      if (length <= MAX_FILE_BYTES) parts.push(part);
    }
    await this.#pause("file", signal);
    const process = this.#same(target.port, pid);
    const files = Object.keys(process.guest.memory).filter((key) => key.startsWith(FILE));
    if (length > MAX_FILE_BYTES || (files.length >= MAX_FILES && !files.includes(FILE + path))) {
      throw new RookeryError("out_of_disk", "A simulated guest keeps a few small files only");
    }
    this.#remember(process, { [FILE + path]: Buffer.concat(parts).toString("base64") });
    return length;
  }

  async *readFile(
    target: EnvdTarget,
    { path }: FileTarget,
    signal: AbortSignal,
  ): AsyncGenerator<{ sizeBytes: number | undefined } | Uint8Array, void, undefined> {
    this.#enter(target);
    await this.#pause("file", signal);
    const bytes = readFile(this.#find(target.port), path);
    if (bytes === undefined) throw new RookeryError("file_not_found", `There is no file ${path}`);
    yield { sizeBytes: bytes.length };
    if (bytes.length > 0) yield bytes;
  }

  async release(): Promise<void> {}

  async close(): Promise<void> {}

  async #run(
    target: EnvdTarget,
    command: Command,
    signal: AbortSignal,
  ): Promise<{ stdout: Buffer; stderr: Buffer; end: Extract<CommandEvent, { kind: "end" }> }> {
    const { pid } = this.#enter(target);
    await this.#pause("exec", signal);
    const process = this.#same(target.port, pid);
    const { stdout, stderr, exitCode, removed, remembered, ends, sleepMs } = runSimulated(command, {
      hostname: process.guest.memory["hostname"] ?? "simulated",
      sandboxId: process.guest.memory["sandboxId"] ?? "",
      file: (path) => readFile(process, path),
    });
    if (removed.length > 0) this.#forget(process, removed);
    if (Object.keys(remembered).length > 0) this.#remember(process, remembered);
    if (ends !== undefined) this.#end(pid, { reason: ends, message: WORDS_OF_END[ends] });
    const limitMs = command.timeoutMs === 0 ? Number.POSITIVE_INFINITY : command.timeoutMs;
    await this.#sleep(Math.min(sleepMs, limitMs), signal);
    this.#same(target.port, pid);
    const timedOut = sleepMs > limitMs;
    const end = timedOut ? { exitCode: -1, signal: "SIGKILL" } : { exitCode, signal: undefined };
    return {
      stdout: Buffer.from(stdout),
      stderr: Buffer.from(stderr),
      end: { kind: "end", ...end, timedOut },
    };
  }

  /** A call of a user: envd takes the token of the last `/init` alone. */
  #enter({ port, accessToken }: EnvdTarget): SimulatedProcess {
    const process = this.#find(port);
    if (process.guest.memory["accessToken"] !== accessToken) {
      throw refusedToken();
    }
    return process;
  }

  #find(port: number): SimulatedProcess {
    const process = this.#processes.atPort(port);
    if (process === undefined || process.state !== "running") {
      throw new RookeryError("guest_error", "nobody answers");
    }
    if (process.corrupt) throw new RookeryError("guest_error", "the guest's memory and disk do not fit");
    return process;
  }

  /** After a while: the guest that was there before, or an error. */
  #same(port: number, pid: number): SimulatedProcess {
    const process = this.#find(port);
    if (process.pid !== pid) throw new RookeryError("guest_error", "The sandbox's VM has ended");
    return process;
  }

  #forget(process: SimulatedProcess, paths: readonly string[]): void {
    const gone = new Set(paths.map((path) => FILE + path));
    const memory = Object.fromEntries(Object.entries(process.guest.memory).filter(([key]) => !gone.has(key)));
    this.#processes.set({ ...process, guest: { ...process.guest, memory } });
  }

  #remember(process: SimulatedProcess, changes: Record<string, string>): void {
    const memory = { ...process.guest.memory, ...changes };
    this.#processes.set({ ...process, guest: { ...process.guest, memory } });
  }
}

function readFile({ guest }: SimulatedProcess, path: string): Buffer | undefined {
  const text = guest.memory[FILE + path];
  return text === undefined ? undefined : Buffer.from(text, "base64");
}
