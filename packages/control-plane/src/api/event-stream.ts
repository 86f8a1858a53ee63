/**
 * Server-sent events: a stream of the services as frames of text/event-stream.
 *
 * The reader sets the pace: a frame is made when the one before has been taken,
 * so nothing piles up here, and a reader that takes nothing for a while is cut
 * off. Comments show that the connection lives. A stream ends when its reader
 * goes, when its key does, and when the server closes: clients come back by
 * themselves, with the id of the last event they had.
 */
import { RookeryError } from "@rookery/protocol/errors";
import type { FastifyReply, FastifyRequest } from "fastify";
import { Readable } from "node:stream";
import type { FollowedEvent, Services } from "../service/services.ts";
import { authenticate } from "./authentication.ts";
import type { ApiLimits } from "./context.ts";
import { renderSandboxEvent } from "./render-event.ts";

export const EVENT_STREAM = "text/event-stream";
/** When clients come back after the end of a stream. */
const RETRY_MS = 1_000;

export interface EventStreamDeps {
  services: Services;
  limits: Pick<ApiLimits, "heartbeatMs" | "streamStallMs">;
  /** The server closes. */
  closing: AbortSignal;
}

export const wantsEventStream = ({ headers }: FastifyRequest): boolean =>
  headers.accept?.toLowerCase().includes(EVENT_STREAM) ?? false;

/** `open` follows until its signal aborts; what it throws is answered as usual. 204: there is no more to come. */
export async function answerEventStream(
  { services, limits, closing }: EventStreamDeps,
  request: FastifyRequest,
  reply: FastifyReply,
  open: (signal: AbortSignal) => Promise<AsyncIterable<FollowedEvent> | undefined>,
): Promise<FastifyReply> {
  const end = new AbortController();
  const stop = (): void => end.abort();
  closing.addEventListener("abort", stop, { once: true });
  reply.raw.once("close", () => {
    closing.removeEventListener("abort", stop);
    stop();
  });
  if (closing.aborted || reply.raw.destroyed) stop();
  const events = await open(end.signal);
  if (events === undefined) return reply.code(204).send();
  const frames = framesOf(events, {
    end,
    heartbeatMs: limits.heartbeatMs,
    stallMs: limits.streamStallMs,
    cut: () => {
      request.log.info({}, "a reader of events took none for too long and was cut off");
      reply.raw.destroy();
    },
    isStillAllowed: () => isStillAllowed(services, request),
  });
  reply
    .type(`${EVENT_STREAM}; charset=utf-8`)
    // It is this stream's alone: when the stream ends, nothing keeps the server from closing.
    .header("connection", "close")
    .header("x-accel-buffering", "no");
  return reply.send(Readable.from(frames, { objectMode: false, highWaterMark: 1 }));
}

interface Framing {
  end: AbortController;
  heartbeatMs: number;
  stallMs: number;
  cut: () => void;
  isStillAllowed: () => Promise<boolean>;
}

async function* framesOf(events: AsyncIterable<FollowedEvent>, framing: Framing): AsyncGenerator<string> {
  const { end, heartbeatMs, stallMs, cut, isStillAllowed: isAllowed } = framing;
  const iterator = events[Symbol.asyncIterator]();
  let checkedAt = performance.now();
  let stall: NodeJS.Timeout | undefined;
  const watched = (frame: string): string => {
    stall = setTimeout(cut, stallMs).unref();
    return frame;
  };
  try {
    // Something at once, so that the reader's headers are there before the first event.
    yield watched(`retry: ${RETRY_MS}\n\n`);
    for (;;) {
      clearTimeout(stall);
      const next = waitingFor(iterator.next());
      while (!(await next.within(heartbeatMs))) {
        if (!(await isAllowed())) return;
        checkedAt = performance.now();
        yield watched(": here\n\n");
        clearTimeout(stall);
      }
      const { done, value } = await next.result;
      if (done === true) return;
      if (performance.now() - checkedAt > heartbeatMs) {
        if (!(await isAllowed())) return;
        checkedAt = performance.now();
      }
      yield watched(frameOf(value));
    }
  } finally {
    clearTimeout(stall);
    // First: who waits for news must not be waited for.
    end.abort();
    await iterator.return?.();
  }
}

/** One promise, asked again and again whether it has settled: without a reaction of its own for each time. */
function waitingFor<T>(result: Promise<T>): { result: Promise<T>; within(ms: number): Promise<boolean> } {
  let isSettled = false;
  let wake = (): void => undefined;
  const settle = (): void => {
    isSettled = true;
    wake();
  };
  result.then(settle, settle);
  return {
    result,
    within: async (ms) => {
      if (isSettled) return true;
      const { promise, resolve } = Promise.withResolvers<void>();
      wake = resolve;
      const timer = setTimeout(resolve, ms);
      await promise;
      clearTimeout(timer);
      return isSettled;
    },
  };
}

function frameOf(item: FollowedEvent): string {
  const [id, name, data] =
    item.kind === "event"
      ? [item.event.number, "sandbox", renderSandboxEvent(item.event)]
      : [item.after, "reset", { after: `${item.after}` }];
  return `id: ${id}\nevent: ${name}\ndata: ${JSON.stringify(data)}\n\n`;
}

/** A key may be deleted while its stream is open. */
async function isStillAllowed(services: Services, request: FastifyRequest): Promise<boolean> {
  try {
    await authenticate(services, request);
    return true;
  } catch (cause) {
    // Where nobody can say, the stream goes on.
    return !(cause instanceof RookeryError && cause.code === "unauthenticated");
  }
}
