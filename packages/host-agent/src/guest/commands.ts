/**
 * Commands in a guest, to their end.
 *
 * Invariant: whoever stops listening (time-out, abort, early return) leaves no
 * process behind: its process group gets SIGKILL.
 */
import { RookeryError } from "@rookery/protocol/errors";
import { closeStdin, killProcess, sendInput, startProcess } from "./process-calls.ts";
import type { Command, Guest, ProcessEvent } from "./process-calls.ts";

export type CommandEvent =
  | Exclude<ProcessEvent, { kind: "end" }>
  | { kind: "end"; exitCode: number; signal: string | undefined; timedOut: boolean };

export interface CommandResult {
  stdout: Uint8Array;
  stderr: Uint8Array;
  exitCode: number;
  signal: string | undefined;
  timedOut: boolean;
  /** Output beyond the cap was dropped. */
  truncated: boolean;
  durationMs: number;
}

/** Collects the output, at most `maxOutputBytes` of each; what is beyond is read and dropped. */
export async function execCommand(
  guest: Guest,
  command: Command,
  options: { maxOutputBytes: number },
  signal: AbortSignal,
): Promise<CommandResult> {
  const startedAt = performance.now();
  const stdout = new CappedBytes(options.maxOutputBytes);
  const stderr = new CappedBytes(options.maxOutputBytes);
  for await (const event of runCommand(guest, command, signal)) {
    if (event.kind === "stdout") stdout.add(event.data);
    else if (event.kind === "stderr") stderr.add(event.data);
    else if (event.kind === "end") {
      const { exitCode, signal: endedBy, timedOut } = event;
      return {
        stdout: stdout.bytes(),
        stderr: stderr.bytes(),
        exitCode,
        signal: endedBy,
        timedOut,
        truncated: stdout.truncated || stderr.truncated,
        durationMs: Math.round(performance.now() - startedAt),
      };
    }
  }
  throw new RookeryError("guest_error", "The guest sent a stream without an end");
}

/** Yields `start` first and `end` last. */
export async function* runCommand(
  guest: Guest,
  command: Command,
  signal: AbortSignal,
): AsyncGenerator<CommandEvent, void, undefined> {
  signal.throwIfAborted();
  const { commandMs, killGraceMs } = guest.limits;
  const timeoutMs = command.timeoutMs === 0 ? commandMs : Math.min(command.timeoutMs, commandMs);
  // Ends the stream itself, when even SIGKILL brought no end of it: a process
  // that left the group may hold the pipes, or the guest lies.
  const cut = new AbortController();
  const feeding = new AbortController();
  let pid: number | undefined;
  let end: Extract<ProcessEvent, { kind: "end" }> | undefined;
  let pastTime = false;
  let grace: NodeJS.Timeout | undefined;

  const kill = (): void => {
    grace ??= setTimeout(() => cut.abort(new Error("no end after SIGKILL")), killGraceMs);
    if (pid !== undefined) void killGroup(guest, pid);
  };
  const timer = setTimeout(() => {
    pastTime = true;
    kill();
  }, timeoutMs);
  signal.addEventListener("abort", kill, { once: true });

  try {
    // envd's own bound comes later than ours, so it only counts when the agent is dead.
    const lifetimeMs = timeoutMs + 2 * killGraceMs;
    for await (const event of startProcess(guest, command, { lifetimeMs }, cut.signal)) {
      if (event.kind === "end") {
        end = event;
        // What follows is the stream's last frame; read, it leaves a connection to use again.
        grace ??= setTimeout(() => cut.abort(new Error("no last frame")), killGraceMs);
        continue;
      }
      if (event.kind === "start") {
        pid = event.pid;
        if (pastTime || signal.aborted) kill();
        else if (command.stdin.byteLength > 0) void feedStdin(guest, pid, command.stdin, feeding.signal);
      }
      yield event;
    }
    if (signal.aborted) throw signal.reason;
    if (end !== undefined) yield { ...end, timedOut: pastTime && end.signal !== undefined };
  } catch (cause) {
    if (signal.aborted) throw signal.reason;
    if (!cut.signal.aborted) throw cause;
    if (end !== undefined) {
      yield { ...end, timedOut: pastTime && end.signal !== undefined };
      return;
    }
    if (pid === undefined) {
      throw new RookeryError("guest_error", "The guest did not start the command in time", { cause });
    }
    yield { kind: "end", exitCode: -1, signal: "SIGKILL", timedOut: true };
  } finally {
    clearTimeout(timer);
    clearTimeout(grace);
    signal.removeEventListener("abort", kill);
    feeding.abort();
    if (pid !== undefined && end === undefined && !pastTime) await killGroup(guest, pid);
  }
}

/** A failure shows in the stream: its end does not come, and `grace` decides. */
async function killGroup(guest: Guest, pid: number): Promise<void> {
  await killProcess(guest, pid, AbortSignal.timeout(guest.limits.killGraceMs)).catch(() => undefined);
}

/**
 * Sends the input and closes it. A refusal ends the sending and nothing else:
 * it is for the command to read its input or not, as with any pipe; and a
 * broken guest shows in the command's own stream.
 */
async function feedStdin(guest: Guest, pid: number, stdin: Uint8Array, signal: AbortSignal): Promise<void> {
  const piece = guest.limits.stdinChunkBytes;
  try {
    for (let offset = 0; offset < stdin.byteLength; offset += piece) {
      await sendInput(guest, pid, stdin.subarray(offset, offset + piece), signal);
    }
    await closeStdin(guest, pid, signal);
  } catch {
    return;
  }
}

/** Grows by doubling, to at most `cap`; copies, so that no socket buffer is kept for a few bytes of it. */
class CappedBytes {
  readonly #cap: number;
  #buffer = Buffer.alloc(0);
  #length = 0;
  truncated = false;

  constructor(cap: number) {
    this.#cap = cap;
  }

  add(data: Uint8Array): void {
    const taken = Math.min(data.byteLength, this.#cap - this.#length);
    if (taken < data.byteLength) this.truncated = true;
    if (taken === 0) return;
    const needed = this.#length + taken;
    if (needed > this.#buffer.byteLength) {
      const grown = Buffer.allocUnsafeSlow(
        Math.min(this.#cap, Math.max(needed, 2 * this.#buffer.byteLength)),
      );
      grown.set(this.bytes());
      this.#buffer = grown;
    }
    this.#buffer.set(taken === data.byteLength ? data : data.subarray(0, taken), this.#length);
    this.#length = needed;
  }

  bytes(): Uint8Array {
    return this.#buffer.subarray(0, this.#length);
  }
}
