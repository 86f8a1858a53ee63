/** What every admitted call passes: the log, and the translation of errors. */
import { Code, ConnectError, createContextKey } from "@connectrpc/connect";
import type { ContextKey, Interceptor, StreamResponse } from "@connectrpc/connect";
import type { Clock } from "../sandbox-manager/clock.ts";
import type { Logger } from "../sandbox-manager/deps.ts";
import type { Trust } from "./auth.ts";
import { isUnexpected, toConnectError } from "./errors.ts";

/** Who commands: set for every call that reaches the service. */
export const TRUST: ContextKey<Trust | undefined> = createContextKey<Trust | undefined>(undefined);

/** Logs each call once it has ended: what, for whom, how long, with which code. Never contents. */
export function logAndTranslate(logger: Logger, clock: Clock): Interceptor {
  return (next) => async (request) => {
    const startedAt = clock.monotonicMs();
    const facts: Record<string, unknown> = { rpc: request.method.name };
    if (!request.stream) facts["sandbox"] = sandboxOf(request.message);
    const done = (error?: unknown): void => {
      facts["ms"] = Math.round((clock.monotonicMs() - startedAt) * 10) / 10;
      if (error === undefined) logger.debug(facts, "call");
      else if (isUnexpected(error)) logger.error({ ...facts, err: error }, "call failed by a fault of ours");
      else logger.info({ ...facts, code: codeOf(error), err: error }, "call refused");
    };
    try {
      const response = await next(request);
      if (response.stream) return { ...response, message: translate(response, done) };
      done();
      return response;
    } catch (error) {
      done(error);
      throw toConnectError(error);
    }
  };
}

async function* translate(
  response: StreamResponse,
  done: (error?: unknown) => void,
): AsyncGenerator<StreamResponse["message"] extends AsyncIterable<infer T> ? T : never> {
  let failure: unknown;
  try {
    yield* response.message;
  } catch (error) {
    failure = error;
    throw toConnectError(error);
  } finally {
    done(failure);
  }
}

function sandboxOf(message: unknown): string | undefined {
  if (typeof message !== "object" || message === null) return undefined;
  if ("sandboxId" in message && typeof message.sandboxId === "string") return message.sandboxId.slice(0, 64);
  return "operation" in message ? sandboxOf(message.operation) : undefined;
}

function codeOf(error: unknown): string {
  if (error instanceof ConnectError) return Code[error.code];
  return error instanceof Error && "code" in error ? String(error.code) : "canceled";
}
