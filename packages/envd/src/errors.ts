/**
 * Errors that go to callers: one class, rendered as `{code, message}` by the
 * HTTP routes and as a Connect error by the services.
 */
import { Code, ConnectError } from "@connectrpc/connect";

export class HttpError extends Error {
  override readonly name = "HttpError";
  readonly status: number;

  constructor(status: number, message: string, options?: ErrorOptions) {
    super(message, options);
    this.status = status;
  }
}

/** "ENOENT" and the like; also Node's own codes ("ERR_…", "Z_DATA_ERROR"). */
export function errnoOf(error: unknown): string | undefined {
  if (!(error instanceof Error) || !("code" in error)) return undefined;
  return typeof error.code === "string" ? error.code : undefined;
}

export function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

/** What the kernel said, without the caller's path in it twice: "no such file or directory". */
export function systemMessage(error: unknown): string {
  const text = messageOf(error);
  return /^[A-Z0-9]+: ([^,]+)/.exec(text)?.[1] ?? text;
}

const ERRNO_CODES: Record<string, Code> = {
  ENOENT: Code.NotFound,
  EEXIST: Code.AlreadyExists,
  EACCES: Code.PermissionDenied,
  EPERM: Code.PermissionDenied,
  ENOTDIR: Code.InvalidArgument,
  EISDIR: Code.InvalidArgument,
  EINVAL: Code.InvalidArgument,
  ELOOP: Code.InvalidArgument,
  ENAMETOOLONG: Code.InvalidArgument,
  ENOTEMPTY: Code.FailedPrecondition,
  EBUSY: Code.FailedPrecondition,
  EROFS: Code.FailedPrecondition,
  ETXTBSY: Code.FailedPrecondition,
  EAGAIN: Code.ResourceExhausted,
  ENOMEM: Code.ResourceExhausted,
  EMFILE: Code.ResourceExhausted,
  ENFILE: Code.ResourceExhausted,
  ENOSPC: Code.ResourceExhausted,
  EDQUOT: Code.ResourceExhausted,
};

/** `what` says what was tried: "error removing file or directory '/x'". */
export function connectErrorOf(error: unknown, what: string): ConnectError {
  if (error instanceof ConnectError) return error;
  const code = ERRNO_CODES[errnoOf(error) ?? ""] ?? Code.Internal;
  return new ConnectError(`${what}: ${systemMessage(error)}`, code, undefined, undefined, error);
}
