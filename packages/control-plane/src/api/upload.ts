/** One file on its way into a sandbox, whichever way its request carried it. */
import { RookeryError } from "@rookery/protocol/errors";
import type { IncomingMessage } from "node:http";
import type { ApiLimits } from "./context.ts";
import { guestPath } from "./schemas/common.ts";
import { invalidField, invalidRequest, violationsOf } from "./violations.ts";

export type UploadLimits = Pick<ApiLimits, "fileBytes" | "uploadStallMs">;

export interface Upload extends Disposable {
  path: string;
  /** Throws when the upload tears, stalls, breaks its form or grows too big. */
  content: AsyncIterable<Uint8Array>;
}

/** An octet-stream: the body is the file, and its path stands in the query. */
export function readRawUpload(
  request: IncomingMessage,
  path: string | undefined,
  limits: UploadLimits,
): Upload {
  if (path === undefined)
    throw invalidField("path", "is required in the query with application/octet-stream");
  return { path, content: rawContent(request, limits), [Symbol.dispose]: () => {} };
}

async function* rawContent(request: IncomingMessage, limits: UploadLimits): AsyncGenerator<Uint8Array> {
  const chunks = request.iterator({ destroyOnReturn: false }) as AsyncIterator<Buffer>;
  let bytes = 0;
  for (;;) {
    const { done, value } = await chunkInTime(chunks, limits);
    if (done === true) break;
    bytes += value.length;
    if (bytes > limits.fileBytes) throw fileTooLarge(limits);
    yield value;
  }
}

async function chunkInTime(
  chunks: AsyncIterator<Buffer>,
  limits: UploadLimits,
): Promise<IteratorResult<Buffer, unknown>> {
  const late = Promise.withResolvers<never>();
  const timer = setTimeout(() => late.reject(stalled(limits)), limits.uploadStallMs);
  try {
    return await Promise.race([chunks.next(), late.promise]);
  } catch (cause) {
    if (cause instanceof RookeryError) throw cause;
    throw new RookeryError("invalid_request", "the connection closed before the body's end", { cause });
  } finally {
    clearTimeout(timer);
  }
}

/** A body that announces itself too big is refused unread; a form may be a little bigger than its file. */
export function refuseTooLarge(request: IncomingMessage, limits: UploadLimits): void {
  const FORM_BYTES = 64 * 1024;
  if (Number(request.headers["content-length"]) > limits.fileBytes + FORM_BYTES) throw fileTooLarge(limits);
}

export function parseGuestPath(value: string): string {
  const result = guestPath.safeParse(value);
  if (result.success) return result.data;
  const violations = violationsOf(result.error, value).map(({ reason }) => ({ field: "path", reason }));
  throw invalidRequest(violations, "form");
}

export function fileTooLarge({ fileBytes }: UploadLimits): RookeryError {
  return new RookeryError("payload_too_large", `a file must be at most ${fileBytes} bytes`, {
    details: { limit_bytes: fileBytes },
  });
}

export function stalled({ uploadStallMs }: UploadLimits): RookeryError {
  return new RookeryError("invalid_request", `the upload brought nothing for ${uploadStallMs} ms`);
}
