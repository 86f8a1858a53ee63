/**
 * The only place where a failure becomes an answer, whoever failed: a service,
 * a schema, Fastify, Node's parser, or a bug. What is no RookeryError and no
 * fault of the request is `internal`: logged whole, answered without a word of it.
 */
import { ERRORS, RookeryError } from "@rookery/protocol/errors";
import type { ErrorCode } from "@rookery/protocol/errors";
import type { FastifyReply, FastifyRequest } from "fastify";
import type { Socket } from "node:net";
import { hasUnreadBody, lingering } from "./lingering-close.ts";

const RETRY_AFTER_SEC = 5;
/** A sandbox with too many calls at once: the next one may end at any time. */
const RATE_LIMITED_RETRY_AFTER_SEC = 1;

export function answerError(error: unknown, request: FastifyRequest, reply: FastifyReply): FastifyReply {
  const failure = toRookeryError(error, request);
  const { status } = ERRORS[failure.code];
  logFailure(failure, status, request);
  const body = Buffer.from(JSON.stringify(renderError(failure)));
  for (const name of ["content-length", "content-disposition", "etag", "last-modified"])
    reply.removeHeader(name);
  // A path that Fastify can't decode comes here past all hooks: what they set is set again.
  reply.code(status).type("application/json; charset=utf-8").header("cache-control", "no-store");
  reply.header("x-request-id", request.id).header("x-content-type-options", "nosniff");
  if (status === 401) {
    const fault = failure.code === "invalid_token" ? ', error="invalid_token"' : "";
    reply.header("www-authenticate", `Bearer realm="rookery"${fault}`);
  }
  const retryAfterSec = retryAfterOf(failure, status);
  if (retryAfterSec !== undefined) reply.header("retry-after", String(retryAfterSec));
  if (request.method === "HEAD" || !hasUnreadBody(request.raw)) return reply.send(body);
  return reply
    .header("connection", "close")
    .header("content-length", String(body.length))
    .send(lingering(body, request.raw));
}

export function renderError({ code, message, details }: RookeryError) {
  return { error: { code, message, ...(details === undefined ? {} : { details }) } };
}

function retryAfterOf(failure: RookeryError, status: number): number | undefined {
  const told = failure.details?.["retry_after_sec"];
  if (typeof told === "number") return Math.max(1, Math.ceil(told));
  if (failure.code === "rate_limited") return RATE_LIMITED_RETRY_AFTER_SEC;
  return status === 503 ? RETRY_AFTER_SEC : undefined;
}

function logFailure(failure: RookeryError, status: number, request: FastifyRequest): void {
  if (status >= 500) {
    request.log.error(
      { err: failure.code === "internal" ? (failure.cause ?? failure) : failure },
      "request failed",
    );
  } else {
    request.log.debug({ code: failure.code, reason: failure.message }, "request refused");
  }
}

/** Fastify's own codes that are the caller's fault in a way of their own; the rest of its 4xx are 400. */
const FASTIFY_CODES: Readonly<Record<string, readonly [ErrorCode, string]>> = {
  FST_ERR_CTP_INVALID_MEDIA_TYPE: [
    "unsupported_media_type",
    "this call does not take a body of this Content-Type: send application/json, unless /docs says otherwise",
  ],
  FST_ERR_CTP_BODY_TOO_LARGE: ["payload_too_large", "the body is too large"],
  FST_ERR_BAD_URL: ["invalid_request", "the path is not correctly percent-encoded"],
  FST_ERR_MAX_PARAM_LENGTH: ["not_found", "there is nothing by this id or name"],
};

export function toRookeryError(error: unknown, request: FastifyRequest): RookeryError {
  if (error instanceof RookeryError) return error;
  if (error instanceof Error) {
    const code = "code" in error ? error.code : undefined;
    const known = typeof code === "string" ? FASTIFY_CODES[code] : undefined;
    if (known !== undefined) return new RookeryError(known[0], known[1], { cause: error });
    const status = "statusCode" in error ? error.statusCode : undefined;
    if (
      typeof code === "string" &&
      code.startsWith("FST_ERR_") &&
      typeof status === "number" &&
      status < 500
    ) {
      return new RookeryError("invalid_request", "the request is malformed", { cause: error });
    }
  }
  return new RookeryError(
    "internal",
    `something failed on our side; its log names the request ${request.id}`,
    {
      cause: error,
    },
  );
}

/** What Node's HTTP parser refused: there is no request yet, only a socket. */
export function answerClientError(error: Error & { code?: string }, socket: Socket): void {
  if (error.code === "ECONNRESET" || !socket.writable) {
    socket.destroy(error);
    return;
  }
  const message =
    error.code === "HPE_HEADER_OVERFLOW"
      ? "the headers are too large"
      : error.code === "ERR_HTTP_REQUEST_TIMEOUT"
        ? "the request did not arrive in time"
        : "this is not HTTP/1.1";
  const body = JSON.stringify(renderError(new RookeryError("invalid_request", message)));
  socket.end(
    "HTTP/1.1 400 Bad Request\r\nContent-Type: application/json; charset=utf-8\r\nConnection: close\r\n" +
      `Content-Length: ${Buffer.byteLength(body)}\r\n\r\n${body}`,
  );
  // A peer that reads nothing must not keep the socket.
  socket.setTimeout(5_000, () => socket.destroy());
}
