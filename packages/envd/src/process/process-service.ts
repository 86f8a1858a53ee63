/**
 * process.Process of E2B's protocol.
 *
 * A client that goes away leaves its process running; only the deadline
 * (Connect-Timeout-Ms of Start) and SendSignal end it, and both reach the
 * whole process group.
 */
import { Code, ConnectError } from "@connectrpc/connect";
import { process as wire } from "@rookery/protocol/envd";
import { callerOf } from "../caller.ts";
import type { GuestState } from "../guest-state.ts";
import {
  DEFAULT_KEEPALIVE_MS,
  MAX_PROCESSES,
  MAX_SUBSCRIBERS,
  MAX_TIMEOUT_MS,
  MIN_KEEPALIVE_MS,
} from "../limits.ts";
import type { Users } from "../system/users.ts";
import type { ServiceMethods } from "../rpc/connect-server.ts";
import type { RpcContext } from "../rpc/rpc-context.ts";
import type { ProcessTable, Selector } from "./process-table.ts";
import { InputError, RunningProcess } from "./running-process.ts";
import { StartError, startProgram } from "./spawn.ts";
import type { Program, ProgramSpec, SpawnDeps } from "./spawn.ts";
import { parseStartRequest } from "./start-request.ts";
import type { OutputName, ProcessEnd } from "./subscription.ts";

export interface ProcessDeps extends SpawnDeps {
  state: GuestState;
  users: Users;
  table: ProcessTable;
  path: string;
}

type EventInit =
  | { case: "start"; value: { pid: number } }
  | { case: "data"; value: { output: { case: OutputName; value: Uint8Array } } }
  | { case: "end"; value: ProcessEnd }
  | { case: "keepalive"; value: Record<string, never> };
type Event = { event: { event: EventInit } };

export function processMethods(deps: ProcessDeps): ServiceMethods<typeof wire.Process> {
  const { table } = deps;
  const findRunning = (wanted: wire.ProcessSelector | undefined): RunningProcess => {
    const selector = selectorOf(wanted);
    const running = table.find(selector);
    if (running === undefined) throw notFound(selector);
    return running;
  };
  return {
    list: () => ({
      processes: Array.from(table.running(), ({ pid, facts }) => ({
        pid,
        tag: facts.tag,
        config: { cmd: facts.command, args: [...facts.args], envs: { ...facts.envs }, cwd: facts.cwd },
      })),
    }),

    async *start(request, context) {
      const caller = callerOf(context.headers, deps);
      const { spec, facts } = parseStartRequest(request, { ...caller, path: deps.path });
      if (table.size >= MAX_PROCESSES) {
        throw new ConnectError(`more than ${MAX_PROCESSES} processes`, Code.ResourceExhausted);
      }
      const running = new RunningProcess({
        facts,
        program: await start(spec, deps),
        native: deps.native,
        reaper: deps.reaper,
        // Its own clock: the stream's stops when the client goes away.
        timeoutMs: context.timeoutMs,
        onEnd: (process, end) => table.end(process, end),
      });
      table.add(running);
      yield* follow(running, context);
    },

    async *connect(request, context) {
      const selector = selectorOf(request.process);
      const running = table.find(selector);
      if (running !== undefined) {
        yield* follow(running, context);
        return;
      }
      const ended = table.findEnded(selector);
      if (ended === undefined) throw notFound(selector);
      yield eventOf({ case: "start", value: { pid: ended.pid } });
      yield eventOf({ case: "end", value: ended.end });
    },

    update: (request) => {
      findRunning(request.process);
      throw new ConnectError("tty not assigned to process", Code.Unimplemented);
    },

    sendInput: async (request, context) => {
      await feed(findRunning(request.process), request.input, context.signal);
      return {};
    },

    async streamInput(requests, context) {
      let running: RunningProcess | undefined;
      for await (const { event } of requests) {
        if (event.case === "start") running = findRunning(event.value.process);
        else if (event.case === "data") {
          if (running === undefined) {
            throw new ConnectError("the first message must be `start`", Code.InvalidArgument);
          }
          await feed(running, event.value.input, context.signal);
        } else if (event.case === undefined) {
          throw new ConnectError("a message has no event", Code.InvalidArgument);
        }
      }
      return {};
    },

    sendSignal: (request) => {
      const running = findRunning(request.process);
      if (!running.kill(signalOf(request.signal))) throw notFound(selectorOf(request.process));
      return {};
    },

    closeStdin: (request) => {
      findRunning(request.process).closeInput();
      return {};
    },
  };
}

async function start(spec: ProgramSpec, deps: SpawnDeps): Promise<Program> {
  try {
    return await startProgram(spec, deps);
  } catch (error) {
    if (!(error instanceof StartError)) throw error;
    const words = [spec.command, ...spec.args].join(" ").slice(0, 200);
    const what = error.what === "cwd" ? `cwd '${spec.cwd}'` : `error starting process '${words}'`;
    // The kernel's or the cgroup's limits, not the request, are at fault.
    const code = error.what === "system" ? Code.ResourceExhausted : Code.InvalidArgument;
    throw new ConnectError(
      `${what}: ${REASONS[error.code] ?? error.code}`,
      code,
      undefined,
      undefined,
      error,
    );
  }
}

const REASONS: Partial<Record<string, string>> = {
  ENOENT: "no such file or directory",
  EACCES: "permission denied",
  E2BIG: "argument list too long",
  EAGAIN: "the sandbox has as many processes as it may",
  ENOMEM: "the sandbox is out of memory",
};

/** `start`, the output, `end`; keepalives while it is silent. */
async function* follow(running: RunningProcess, context: RpcContext): AsyncGenerator<Event> {
  if (running.subscribers >= MAX_SUBSCRIBERS) {
    throw new ConnectError(`more than ${MAX_SUBSCRIBERS} streams on one process`, Code.ResourceExhausted);
  }
  const keepaliveMs = keepaliveOf(context.headers["keepalive-ping-interval"]);
  const subscription = running.subscribe();
  try {
    yield eventOf({ case: "start", value: { pid: running.pid } });
    for (;;) {
      const event = subscription.shift();
      if (event === undefined) {
        if (context.signal.aborted) throw abortError(running, context.signal);
        const timedOut = await subscription.wait(keepaliveMs, context.signal);
        if (timedOut) yield eventOf({ case: "keepalive", value: {} });
      } else if (event.kind === "output") {
        yield eventOf({ case: "data", value: { output: { case: event.from, value: event.data } } });
      } else {
        if (running.timedOut) throw deadlineExceeded();
        yield eventOf({ case: "end", value: event.end });
        return;
      }
    }
  } finally {
    running.unsubscribe(subscription);
  }
}

/** The stream's deadline is the process's too: whichever timer fires first, both end. */
function abortError(running: RunningProcess, signal: AbortSignal): unknown {
  if (ConnectError.from(signal.reason).code !== Code.DeadlineExceeded) return signal.reason;
  running.kill("SIGKILL");
  return deadlineExceeded();
}

function deadlineExceeded(): ConnectError {
  return new ConnectError("the operation timed out", Code.DeadlineExceeded);
}

async function feed(
  running: RunningProcess,
  input: wire.ProcessInput | undefined,
  signal: AbortSignal,
): Promise<void> {
  if (input?.input.case === "pty") throw new ConnectError("tty not assigned to process", Code.Unimplemented);
  if (input?.input.case !== "stdin") throw new ConnectError("input is empty", Code.InvalidArgument);
  try {
    await running.writeInput(input.input.value, signal);
  } catch (error) {
    if (!(error instanceof InputError)) throw error;
    throw new ConnectError(`error writing to stdin: ${error.message}`, Code.FailedPrecondition);
  }
}

function selectorOf(selector: wire.ProcessSelector | undefined): Selector {
  const wanted = selector?.selector;
  if (wanted?.case === undefined) throw new ConnectError("process is not selected", Code.InvalidArgument);
  return wanted;
}

function signalOf(signal: wire.Signal): "SIGKILL" | "SIGTERM" {
  if (signal === wire.Signal.SIGKILL) return "SIGKILL";
  if (signal === wire.Signal.SIGTERM) return "SIGTERM";
  throw new ConnectError(`invalid signal: ${signal}`, Code.InvalidArgument);
}

function notFound(selector: Selector): ConnectError {
  return new ConnectError(`process with ${selector.case} ${selector.value} not found`, Code.NotFound);
}

function keepaliveOf(header: string | string[] | undefined): number {
  const seconds = Number(header);
  if (!(seconds > 0)) return DEFAULT_KEEPALIVE_MS;
  return Math.min(Math.max(seconds * 1000, MIN_KEEPALIVE_MS), MAX_TIMEOUT_MS);
}

function eventOf(event: EventInit): Event {
  return { event: { event } };
}
