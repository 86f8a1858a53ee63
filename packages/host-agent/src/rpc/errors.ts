/**
 * The border's errors: RookeryError → ConnectError with an ErrorInfo detail.
 *
 * What is not a RookeryError is a bug or a failure of this host: the caller
 * gets `internal` without its words, which may name paths; the log gets all.
 */
import { Code, ConnectError } from "@connectrpc/connect";
import { ERRORS, RookeryError } from "@rookery/protocol/errors";
import { ErrorInfoSchema } from "@rookery/protocol/hostagent";
import { comesFromFullDisk } from "../host/errno.ts";

export function toConnectError(error: unknown): ConnectError {
  if (error instanceof ConnectError) return error;
  if (!(error instanceof RookeryError) && comesFromFullDisk(error)) {
    return toConnectError(new RookeryError("out_of_disk", "this host's disk is full", { cause: error }));
  }
  if (error instanceof RookeryError) {
    const value = { code: error.code, details: textsOf(error.details) };
    const detail = { desc: ErrorInfoSchema, value };
    return new ConnectError(error.message, ERRORS[error.code].rpc, undefined, [detail], error);
  }
  if (isAbort(error))
    return new ConnectError("the call was cancelled", Code.Canceled, undefined, undefined, error);
  const detail = { desc: ErrorInfoSchema, value: { code: "internal" } };
  return new ConnectError("internal error", Code.Internal, undefined, [detail], error);
}

/** Is it our fault, and thus for the log? */
export function isUnexpected(error: unknown): boolean {
  return !(error instanceof ConnectError || error instanceof RookeryError || isAbort(error));
}

function isAbort(error: unknown): boolean {
  return error instanceof Error && (error.name === "AbortError" || error.name === "TimeoutError");
}

function textsOf(details: Readonly<Record<string, unknown>> | undefined): Record<string, string> {
  return Object.fromEntries(
    Object.entries(details ?? {}).map(([key, value]) => [
      key,
      typeof value === "string" ? value : JSON.stringify(value),
    ]),
  );
}
