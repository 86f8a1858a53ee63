/**
 * What a guest says when something fails, turned into errors of the table.
 *
 * Only codes and statuses decide; texts are for people. They come from a
 * hostile side, so they are cut and stripped before anyone sees them.
 */
import { RookeryError } from "@rookery/protocol/errors";
import type { ErrorCode } from "@rookery/protocol/errors";
import { z } from "zod";
import { NotServed } from "../sandbox-manager/guest.ts";
import { NoConnection } from "./connect-racing.ts";
import type { GuestLimits } from "./limits.ts";

const MAX_WORDS = 300;

/** Errors of Connect and of envd's HTTP interface: a named or a numeric code. */
const GuestFailure = z.object({
  code: z.union([z.string().max(64), z.int()]).optional(),
  message: z.string().optional(),
});

/** What the call was about: some refusals mean another thing for files than for commands. */
export interface CallContext {
  subject: "command" | "file" | "guest";
  /** The user asked for by the caller, if any. */
  user?: string | undefined;
}

const COMMAND_CODES: Readonly<Record<string, ErrorCode>> = {
  invalid_argument: "invalid_request",
  not_found: "file_not_found",
  deadline_exceeded: "timeout",
  resource_exhausted: "guest_error",
};
const FILE_STATUSES: Readonly<Record<number, ErrorCode>> = {
  400: "invalid_path",
  404: "file_not_found",
  413: "payload_too_large",
  416: "range_not_satisfiable",
  507: "out_of_disk",
};

/** Of a Connect error `{code, message}`: the last frame of a stream, or a unary answer. */
export function errorOfConnectFailure(failure: unknown, context: CallContext): RookeryError {
  const parsed = GuestFailure.safeParse(failure);
  if (!parsed.success) return new RookeryError("guest_error", "The guest's answer makes no sense");
  const { code, message } = parsed.data;
  if (code === "unauthenticated") return refusedUser(context, message);
  const known =
    typeof code === "string" && Object.hasOwn(COMMAND_CODES, code) ? COMMAND_CODES[code]! : "guest_error";
  return new RookeryError(known, wordsOf(message, "The guest refused the command"));
}

/** Of an answer of envd's HTTP interface that is not a 2xx. */
export function errorOfStatus(status: number, body: unknown, context: CallContext): RookeryError {
  const parsed = GuestFailure.safeParse(body);
  const message = parsed.success ? parsed.data.message : undefined;
  if (status === 401) return refusedUser(context, message);
  const code =
    context.subject === "file" && Object.hasOwn(FILE_STATUSES, status)
      ? FILE_STATUSES[status]!
      : "guest_error";
  return new RookeryError(code, wordsOf(message, `The guest answered with status ${status}`));
}

/** The whole of a call was refused for its token, which envd is told anew when it was started again. */
export function refusedToken(): NotServed {
  return new NotServed("The sandbox's envd was started again and does not know the host yet");
}

/** envd refuses an unknown user and a wrong token alike; the token is ours, so it is the user if one was asked for. */
function refusedUser({ user }: CallContext, message: string | undefined): RookeryError {
  if (user === undefined)
    return new RookeryError("guest_error", "The guest does not accept the host's token");
  const reason = wordsOf(message, "no such user");
  return new RookeryError("invalid_request", reason, { details: { field: "user", reason } });
}

function wordsOf(message: string | undefined, otherwise: string): string {
  const words = (message ?? "")
    .slice(0, 4 * MAX_WORDS)
    .replace(/[\p{Cc}\p{Cf}\p{Co}\p{Cs}]+/gu, " ")
    .trim();
  return words === "" ? otherwise : words.slice(0, MAX_WORDS);
}

/** Parses JSON of a guest. Too deep, too long, or no JSON at all: undefined. */
export function parseGuestJson(
  bytes: Uint8Array,
  limits: Pick<GuestLimits, "jsonDepth" | "smallBodyBytes">,
): unknown {
  if (bytes.byteLength > limits.smallBodyBytes) return undefined;
  const text = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).toString("utf8");
  let depth = 0;
  let inString = false;
  for (let i = 0; i < text.length; i += 1) {
    const char = text[i];
    if (inString) {
      if (char === "\\") i += 1;
      else if (char === '"') inString = false;
    } else if (char === '"') inString = true;
    else if (char === "{" || char === "[") {
      depth += 1;
      if (depth > limits.jsonDepth) return undefined;
    } else if (char === "}" || char === "]") depth -= 1;
  }
  try {
    return JSON.parse(text);
  } catch {
    return undefined; // callers say what undefined means to them
  }
}

/** Errors of the transport below a call, as the caller should see them. */
export function errorOfTransport(cause: unknown, signals: readonly AbortSignal[]): Error {
  for (const signal of signals) {
    if (signal.aborted)
      return signal.reason instanceof Error ? signal.reason : new Error("aborted", { cause });
  }
  if (cause instanceof RookeryError) return cause;
  if (cause instanceof NoConnection) {
    return new NotServed("The sandbox's guest takes no connections: its envd may be starting again", {
      cause,
    });
  }
  const code = cause instanceof Error && "code" in cause ? String(cause.code) : "";
  const words = code.includes("TIMEOUT")
    ? "The guest did not answer in time"
    : "The connection to the guest broke";
  return new RookeryError("guest_error", words, { cause });
}
