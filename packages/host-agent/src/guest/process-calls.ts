/**
 * envd's process.Process, as the agent uses it: Start, SendInput, CloseStdin,
 * SendSignal over Connect with binary messages.
 *
 * Invariant: a generator of `startProcess` that ends early (return, throw,
 * abort) leaves no connection behind; the process goes on until it is killed,
 * so callers kill what they leave.
 */
import type { Readable } from "node:stream";
import { create, fromBinary, toBinary } from "@bufbuild/protobuf";
import type { DescMessage, MessageInitShape } from "@bufbuild/protobuf";
import { process as wire } from "@rookery/protocol/envd";
import { RookeryError } from "@rookery/protocol/errors";
import type { Dispatcher, Pool } from "undici";
import { FrameReader, frameOf } from "./envelope.ts";
import { errorOfConnectFailure, errorOfTransport, parseGuestJson, refusedToken } from "./guest-answers.ts";
import type { CallContext } from "./guest-answers.ts";
import type { GuestLimits } from "./limits.ts";

/** A command as the border hands it over: bounded, without NUL bytes. */
export interface Command {
  cmd: string;
  args: readonly string[];
  /** Run `cmd` by `bash -lc`. */
  shell: boolean;
  cwd?: string | undefined;
  env: Readonly<Record<string, string>>;
  user?: string | undefined;
  stdin: Uint8Array;
  /** 0: as long as the agent allows. */
  timeoutMs: number;
}

export type ProcessEvent =
  | { kind: "start"; pid: number }
  | { kind: "stdout" | "stderr"; data: Uint8Array }
  | { kind: "end"; exitCode: number; signal: string | undefined };

/** Where a call goes: a pool, and the token that envd takes. */
export interface Guest {
  pool: Pool;
  accessToken: string;
  limits: GuestLimits;
}

const SERVICE = "/process.Process/";

export async function* startProcess(
  guest: Guest,
  command: Command,
  options: { lifetimeMs: number },
  signal: AbortSignal,
): AsyncGenerator<ProcessEvent, void, undefined> {
  const context: CallContext = { subject: "command", user: command.user };
  const argv = command.shell
    ? {
        cmd: "/bin/bash",
        args: ["-lc", command.cmd, ...(command.args.length > 0 ? ["bash", ...command.args] : [])],
      }
    : { cmd: command.cmd, args: [...command.args] };
  const message = toBinary(
    wire.StartRequestSchema,
    create(wire.StartRequestSchema, {
      process: { ...argv, envs: { ...command.env }, cwd: command.cwd },
      stdin: command.stdin.byteLength > 0,
    }),
  );
  let response: Dispatcher.ResponseData;
  try {
    response = await guest.pool.request({
      method: "POST",
      path: `${SERVICE}Start`,
      headers: {
        ...headersFor(guest, "application/connect+proto", command.user),
        // envd's own bound, should the agent die: it kills the process then.
        "connect-timeout-ms": String(options.lifetimeMs),
      },
      body: frameOf(message),
      signal,
      bodyTimeout: 0, // a command may be silent for as long as it runs
    });
  } catch (cause) {
    throw errorOfTransport(cause, [signal]);
  }
  try {
    await assertStream(guest, response, context);
    yield* readEvents(guest, response, context);
  } catch (cause) {
    throw errorOfTransport(cause, [signal]);
  } finally {
    // A no-op when all was read; else the connection can't be used again.
    response.body.on("error", ignoreAbandoned).destroy();
  }
}

/** For the "error" of an answer whose rest nobody waits for. */
export function ignoreAbandoned(): void {}

/** A body's pieces; without an encoding set they are bytes. */
export function chunksOf(body: Readable): AsyncIterable<Uint8Array> {
  return body as AsyncIterable<Uint8Array>;
}

async function* readEvents(
  guest: Guest,
  response: Dispatcher.ResponseData,
  context: CallContext,
): AsyncGenerator<ProcessEvent, void, undefined> {
  const frames = new FrameReader(guest.limits.messageBytes);
  let started = false;
  let ended = false;
  for await (const chunk of chunksOf(response.body)) {
    for (const { end, data } of frames.push(chunk)) {
      if (end) {
        const failure = failureOfEnd(data, guest.limits);
        if (failure !== undefined) throw errorOfConnectFailure(failure, context);
        continue;
      }
      const event = decodeEvent(data);
      if (event === undefined) continue;
      if (ended || started !== (event.kind !== "start")) throw nonsense("events out of order");
      if (event.kind === "start") started = true;
      if (event.kind === "end") ended = true;
      yield event;
    }
  }
  if (!ended || !frames.ended) throw nonsense("a stream without an end");
}

function decodeEvent(data: Uint8Array): ProcessEvent | undefined {
  let event;
  try {
    event = fromBinary(wire.StartResponseSchema, data, { readUnknownFields: false }).event?.event;
  } catch (cause) {
    throw nonsense("a message that can't be decoded", cause);
  }
  switch (event?.case) {
    case "start":
      return { kind: "start", pid: event.value.pid };
    case "data":
      // PTY output can't come: none was asked for.
      return event.value.output.case === "stdout" || event.value.output.case === "stderr"
        ? { kind: event.value.output.case, data: event.value.output.value }
        : undefined;
    case "end":
      return {
        kind: "end",
        exitCode: event.value.exitCode,
        signal: event.value.exited ? undefined : signalOfStatus(event.value.status),
      };
    default:
      return undefined; // keepalive, or a kind that is newer than we are
  }
}

/** The error of a stream's last frame; undefined: it ended well. */
function failureOfEnd(data: Uint8Array, limits: GuestLimits): unknown {
  const end = parseGuestJson(data, limits);
  if (typeof end !== "object" || end === null) throw nonsense("an end that is no JSON");
  return "error" in end ? end.error : undefined;
}

export function sendInput(guest: Guest, pid: number, data: Uint8Array, signal: AbortSignal): Promise<void> {
  return unary(
    guest,
    "SendInput",
    wire.SendInputRequestSchema,
    {
      process: { selector: { case: "pid", value: pid } },
      input: { input: { case: "stdin", value: data } },
    },
    // A process that does not read its input makes envd wait.
    { signal, answerMs: 0 },
  );
}

export function closeStdin(guest: Guest, pid: number, signal: AbortSignal): Promise<void> {
  const process = { selector: { case: "pid", value: pid } } as const;
  return unary(guest, "CloseStdin", wire.CloseStdinRequestSchema, { process }, { signal });
}

/** SIGKILL to the process group. */
export function killProcess(guest: Guest, pid: number, signal: AbortSignal): Promise<void> {
  return unary(
    guest,
    "SendSignal",
    wire.SendSignalRequestSchema,
    { process: { selector: { case: "pid", value: pid } }, signal: wire.Signal.SIGKILL },
    { signal },
  );
}

async function unary<S extends DescMessage>(
  guest: Guest,
  method: string,
  schema: S,
  message: MessageInitShape<S>,
  options: { signal: AbortSignal; answerMs?: number },
): Promise<void> {
  let status: number;
  let bytes: Uint8Array;
  try {
    const response = await guest.pool.request({
      method: "POST",
      path: `${SERVICE}${method}`,
      headers: headersFor(guest, "application/proto", undefined),
      body: toBinary(schema, create(schema, message)),
      signal: options.signal,
      headersTimeout: options.answerMs ?? guest.limits.answerMs,
    });
    status = response.statusCode;
    bytes = await readSmallBody(response, guest.limits);
  } catch (cause) {
    throw errorOfTransport(cause, [options.signal]);
  }
  if (status === 200) return;
  throw errorOfConnectFailure(parseGuestJson(bytes, guest.limits), { subject: "command" });
}

function headersFor(guest: Guest, contentType: string, user: string | undefined): Record<string, string> {
  return {
    "content-type": contentType,
    "connect-protocol-version": "1",
    "x-access-token": guest.accessToken,
    ...(user === undefined ? {} : { authorization: basicAuthorization(user) }),
  };
}

/** How envd is told the user. */
export function basicAuthorization(user: string): string {
  return `Basic ${Buffer.from(`${user}:`, "utf8").toString("base64")}`;
}

async function assertStream(
  guest: Guest,
  response: Dispatcher.ResponseData,
  context: CallContext,
): Promise<void> {
  const { statusCode, headers } = response;
  if (statusCode === 200 && headers["content-type"] === "application/connect+proto") return;
  // Of a stream, errors of Connect come in its last frame: this one is of the gate before.
  if (statusCode === 401) throw refusedToken();
  const failure = parseGuestJson(await readSmallBody(response, guest.limits), guest.limits);
  throw errorOfConnectFailure(failure, context);
}

/** The whole of an answer that is small by nature; a longer one throws. */
export async function readSmallBody(
  response: Dispatcher.ResponseData,
  limits: Pick<GuestLimits, "smallBodyBytes">,
): Promise<Uint8Array> {
  const parts: Uint8Array[] = [];
  let length = 0;
  for await (const bytes of chunksOf(response.body)) {
    length += bytes.byteLength;
    // Leaving the loop destroys the body.
    if (length > limits.smallBodyBytes)
      throw new RookeryError("guest_error", "The guest's answer is too long");
    parts.push(bytes);
  }
  return parts.length === 1 ? parts[0]! : Buffer.concat(parts);
}

function nonsense(what: string, cause?: unknown): RookeryError {
  return new RookeryError("guest_error", `The guest sent ${what}`, { cause });
}

/** Words of Go's `Signal.String`, which envd's protocol uses (`signal: killed`). */
const SIGNAL_WORDS: Readonly<Record<string, string>> = {
  aborted: "SIGABRT",
  "alarm clock": "SIGALRM",
  "bus error": "SIGBUS",
  "child exited": "SIGCHLD",
  continued: "SIGCONT",
  "floating point exception": "SIGFPE",
  hangup: "SIGHUP",
  "I/O possible": "SIGIO",
  "illegal instruction": "SIGILL",
  interrupt: "SIGINT",
  killed: "SIGKILL",
  "broken pipe": "SIGPIPE",
  "profiling timer expired": "SIGPROF",
  "power failure": "SIGPWR",
  quit: "SIGQUIT",
  "segmentation fault": "SIGSEGV",
  "stack fault": "SIGSTKFLT",
  "stopped (signal)": "SIGSTOP",
  stopped: "SIGTSTP",
  "bad system call": "SIGSYS",
  terminated: "SIGTERM",
  "trace/breakpoint trap": "SIGTRAP",
  "stopped (tty input)": "SIGTTIN",
  "stopped (tty output)": "SIGTTOU",
  "urgent I/O condition": "SIGURG",
  "user defined signal 1": "SIGUSR1",
  "user defined signal 2": "SIGUSR2",
  "virtual timer expired": "SIGVTALRM",
  "window changed": "SIGWINCH",
  "CPU time limit exceeded": "SIGXCPU",
  "file size limit exceeded": "SIGXFSZ",
};

/** "signal: killed" → "SIGKILL", "signal: signal 35" → "SIG35"; a core dump may be noted behind it. */
export function signalOfStatus(status: string): string | undefined {
  const words = /^signal: (.{1,64}?)(?: \(core dumped\))?$/.exec(status)?.[1];
  if (words === undefined) return undefined;
  if (Object.hasOwn(SIGNAL_WORDS, words)) return SIGNAL_WORDS[words];
  const number = /^signal (\d{1,3})$/.exec(words)?.[1];
  return number === undefined ? undefined : `SIG${number}`;
}
