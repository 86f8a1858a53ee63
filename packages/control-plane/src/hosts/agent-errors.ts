/**
 * The RPC border, our side: ConnectError → RookeryError, by its ErrorInfo.
 *
 * A host's word passes to callers only where it is about their request. That it
 * refused *us* (token, cluster, generation) is a fault of the cluster, never a
 * caller's 401.
 */
import { Code, ConnectError } from "@connectrpc/connect";
import { type ErrorCode, RookeryError, isErrorCode } from "@rookery/protocol/errors";
import { ErrorInfoSchema } from "@rookery/protocol/hostagent";

/** Codes that hosts may say and callers may hear as they are. */
const PASSED_ON: ReadonlySet<ErrorCode> = new Set<ErrorCode>([
  "invalid_request",
  "unsupported_shape",
  "invalid_path",
  "not_found",
  "file_not_found",
  "template_not_found",
  "wrong_state",
  "already_exists",
  "stale_generation",
  "payload_too_large",
  "range_not_satisfiable",
  "rate_limited",
  "host_error",
  "guest_error",
  "no_capacity",
  "timeout",
  "out_of_disk",
]);

/** Nobody answered: refused, reset, gone in the middle, or never there. */
const NO_ANSWER: ReadonlySet<Code> = new Set([Code.Unavailable, Code.Aborted, Code.Canceled, Code.Unknown]);

/** `signal` is the caller's: when it has aborted, its reason is the answer. */
export function fromAgentError(cause: unknown, signal?: AbortSignal): unknown {
  if (signal?.aborted) return signal.reason;
  const error = ConnectError.from(cause);
  // The connection itself says it (host-session.ts), wrapped by the transport.
  if (error.cause instanceof RookeryError) return error.cause;
  const [info] = error.findDetails(ErrorInfoSchema);
  if (info && isErrorCode(info.code)) return fromErrorInfo(info.code, info.details, error);
  if (error.code === Code.DeadlineExceeded) {
    return new RookeryError("timeout", "The host did not answer in time.", { cause });
  }
  if (NO_ANSWER.has(error.code) || isConnectionFailure(error)) {
    return new RookeryError("host_unreachable", "The sandbox's host can't be reached; try again shortly.", {
      cause,
    });
  }
  return new RookeryError("host_error", "The host answered with an error.", { cause });
}

function fromErrorInfo(
  code: ErrorCode,
  details: Readonly<Record<string, string>>,
  cause: ConnectError,
): RookeryError {
  if (PASSED_ON.has(code)) {
    if (Object.keys(details).length === 0) return new RookeryError(code, cause.rawMessage, { cause });
    const retryAfterSec = Number(details["retry_after_sec"]);
    const told = Number.isFinite(retryAfterSec) && { retry_after_sec: retryAfterSec };
    return new RookeryError(code, cause.rawMessage, { cause, details: { ...details, ...told } });
  }
  if (code === "unavailable") {
    return new RookeryError("host_unreachable", "The host is not ready; try again shortly.", { cause });
  }
  return new RookeryError("host_error", "The host refused the control plane or failed.", { cause });
}

/** An HTTP/2 session that broke has no code of its own in Connect: Node's is in the chain of causes. */
function isConnectionFailure(error: Error): boolean {
  for (let cause: unknown = error; cause instanceof Error; cause = cause.cause) {
    if ("code" in cause && typeof cause.code === "string") {
      if (
        /^(ERR_HTTP2|ECONN|EPIPE|ENOTFOUND|EHOST|ENET|ETIMEDOUT|ERR_STREAM|ERR_TLS|ERR_SSL)/.test(cause.code)
      ) {
        return true;
      }
    }
  }
  return false;
}
