/**
 * The product's error table: one code per cause.
 *
 * The API, the RPC border, OpenAPI and docs follow it. A code never changes
 * its status; a new cause is one line here.
 */
import { Code } from "@connectrpc/connect";

export const ERRORS = {
  invalid_request: { status: 400, rpc: Code.InvalidArgument, retry: false },
  unsupported_shape: { status: 400, rpc: Code.InvalidArgument, retry: false },
  invalid_path: { status: 400, rpc: Code.InvalidArgument, retry: false },
  unauthenticated: { status: 401, rpc: Code.Unauthenticated, retry: false },
  invalid_token: { status: 401, rpc: Code.Unauthenticated, retry: false },
  forbidden: { status: 403, rpc: Code.PermissionDenied, retry: false },
  not_found: { status: 404, rpc: Code.NotFound, retry: false },
  file_not_found: { status: 404, rpc: Code.NotFound, retry: false },
  template_not_found: { status: 404, rpc: Code.NotFound, retry: false },
  method_not_allowed: { status: 405, rpc: Code.Unimplemented, retry: false },
  not_acceptable: { status: 406, rpc: Code.InvalidArgument, retry: false },
  wrong_state: { status: 409, rpc: Code.FailedPrecondition, retry: false },
  already_exists: { status: 409, rpc: Code.AlreadyExists, retry: false },
  host_has_sandboxes: { status: 409, rpc: Code.FailedPrecondition, retry: false },
  idempotency_mismatch: { status: 409, rpc: Code.FailedPrecondition, retry: false },
  stale_generation: { status: 409, rpc: Code.Aborted, retry: false },
  payload_too_large: { status: 413, rpc: Code.InvalidArgument, retry: false },
  unsupported_media_type: { status: 415, rpc: Code.InvalidArgument, retry: false },
  range_not_satisfiable: { status: 416, rpc: Code.OutOfRange, retry: false },
  quota_exceeded: { status: 429, rpc: Code.ResourceExhausted, retry: true },
  rate_limited: { status: 429, rpc: Code.ResourceExhausted, retry: true },
  internal: { status: 500, rpc: Code.Internal, retry: false },
  host_error: { status: 502, rpc: Code.Internal, retry: true },
  guest_error: { status: 502, rpc: Code.Internal, retry: false },
  no_capacity: { status: 503, rpc: Code.ResourceExhausted, retry: true },
  host_unreachable: { status: 503, rpc: Code.Unavailable, retry: true },
  unavailable: { status: 503, rpc: Code.Unavailable, retry: true },
  timeout: { status: 504, rpc: Code.DeadlineExceeded, retry: true },
  out_of_disk: { status: 507, rpc: Code.ResourceExhausted, retry: false },
} as const satisfies Record<string, { status: number; rpc: Code; retry: boolean }>;

export type ErrorCode = keyof typeof ERRORS;

export interface RookeryErrorOptions extends ErrorOptions {
  /** Facts for the caller, such as the field at fault or the present status. */
  details?: Readonly<Record<string, unknown>>;
}

/** `message` and `details` go to the caller: no host path, no secret. `cause` goes to our log. */
export class RookeryError extends Error {
  override readonly name = "RookeryError";
  readonly code: ErrorCode;
  readonly details: Readonly<Record<string, unknown>> | undefined;

  constructor(code: ErrorCode, message: string, options?: RookeryErrorOptions) {
    super(message, options);
    this.code = code;
    this.details = options?.details;
  }
}

export function isErrorCode(text: string): text is ErrorCode {
  return Object.hasOwn(ERRORS, text);
}
