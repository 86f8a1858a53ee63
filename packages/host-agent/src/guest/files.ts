/**
 * Files of a guest, as streams over envd's `GET|POST /files`, with backpressure
 * from end to end: what the receiver does not take is not read from the sender.
 */
import { Readable } from "node:stream";
import { RookeryError } from "@rookery/protocol/errors";
import type { Dispatcher } from "undici";
import { errorOfStatus, errorOfTransport, parseGuestJson, refusedToken } from "./guest-answers.ts";
import { basicAuthorization, chunksOf, ignoreAbandoned, readSmallBody } from "./process-calls.ts";
import type { Guest } from "./process-calls.ts";
import { takesToken } from "./token-check.ts";

/** Read from the sender ahead of the guest. */
const WRITE_AHEAD_BYTES = 256 << 10;

export interface FileTarget {
  path: string;
  user?: string | undefined;
}

/** Writes all of `content`; the answer is how many bytes that was. An abort leaves the old file. */
export async function writeFile(
  guest: Guest,
  file: FileTarget,
  content: AsyncIterable<Uint8Array>,
  signal: AbortSignal,
): Promise<number> {
  const stalled = new AbortController();
  const stopping = AbortSignal.any([signal, stalled.signal]);
  let timer: NodeJS.Timeout | undefined;
  const awaitGuest = (ms: number): void => {
    clearTimeout(timer);
    timer = setTimeout(
      () => stalled.abort(new RookeryError("guest_error", "The guest did not take the file in time")),
      ms,
    );
  };
  let written = 0;
  // The guest's time runs only while it has something to take; the sender's own
  // pauses are its caller's affair.
  let sourceFailure: unknown;
  async function* timed(): AsyncGenerator<Uint8Array> {
    try {
      for await (const piece of content) {
        if (piece.byteLength === 0) continue;
        awaitGuest(guest.limits.fileIdleMs);
        yield piece;
        clearTimeout(timer);
        written += piece.byteLength;
      }
    } catch (cause) {
      sourceFailure = cause;
      throw cause;
    }
    awaitGuest(guest.limits.answerMs);
  }
  try {
    const response = await guest.pool.request({
      method: "POST",
      path: pathOf(file),
      headers: { ...headersFor(guest, file), "content-type": "application/octet-stream" },
      body: Readable.from(timed(), { objectMode: false, highWaterMark: WRITE_AHEAD_BYTES }),
      signal: stopping,
      headersTimeout: 0,
    });
    const body = await readSmallBody(response, guest.limits);
    if (response.statusCode !== 200) throw await refusal(guest, file, response, body, stopping);
    return written;
  } catch (cause) {
    if (sourceFailure !== undefined) throw sourceFailure;
    throw errorOfTransport(cause, [signal, stalled.signal]);
  } finally {
    clearTimeout(timer);
  }
}

/**
 * Reads a file: yields its size first (undefined when the guest doesn't say it),
 * then the pieces. Throws when the guest sends less or more than it said.
 */
export async function* readFile(
  guest: Guest,
  file: FileTarget,
  signal: AbortSignal,
): AsyncGenerator<{ sizeBytes: number | undefined } | Uint8Array, void, undefined> {
  let body: Readable | undefined;
  try {
    const response = await guest.pool.request({
      method: "GET",
      path: pathOf(file),
      headers: { ...headersFor(guest, file), "accept-encoding": "identity" },
      signal,
    });
    body = response.body;
    if (response.statusCode !== 200) {
      throw await refusal(guest, file, response, await readSmallBody(response, guest.limits), signal);
    }
    const sizeBytes = sizeOf(response);
    const limit = sizeBytes ?? guest.limits.fileBytes;
    if (limit > guest.limits.fileBytes)
      throw new RookeryError("guest_error", "The guest's file is larger than its disk");
    yield { sizeBytes };
    let seen = 0;
    for await (const piece of chunksOf(body)) {
      seen += piece.byteLength;
      if (seen > limit)
        throw new RookeryError("guest_error", "The guest sent more of the file than there is");
      yield piece;
    }
    if (sizeBytes !== undefined && seen < sizeBytes) {
      throw new RookeryError("guest_error", "The guest sent less of the file than it said");
    }
  } catch (cause) {
    throw errorOfTransport(cause, [signal]);
  } finally {
    body?.on("error", ignoreAbandoned).destroy();
  }
}

function pathOf({ path, user }: FileTarget): string {
  const query = new URLSearchParams({ path });
  if (user !== undefined) query.set("username", user);
  return `/files?${query.toString()}`;
}

function headersFor(guest: Guest, { user }: FileTarget): Record<string, string> {
  return {
    "x-access-token": guest.accessToken,
    ...(user === undefined ? {} : { authorization: basicAuthorization(user) }),
  };
}

async function refusal(
  guest: Guest,
  { user }: FileTarget,
  { statusCode }: Dispatcher.ResponseData,
  body: Uint8Array,
  signal: AbortSignal,
): Promise<RookeryError> {
  // An unknown user is a 401 too.
  if (statusCode === 401 && !(await takesToken(guest, signal))) return refusedToken();
  return errorOfStatus(statusCode, parseGuestJson(body, guest.limits), { subject: "file", user });
}

function sizeOf({ headers }: Dispatcher.ResponseData): number | undefined {
  const text = headers["content-length"];
  return typeof text === "string" && /^\d{1,15}$/.test(text) ? Number(text) : undefined;
}
