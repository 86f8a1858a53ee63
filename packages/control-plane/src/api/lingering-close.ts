/**
 * Answering before the whole request has come, as to a body that is too big.
 *
 * Closing a connection with unread bytes makes the kernel send RST, which may
 * take the answer away from a client that is still sending. So the answer goes
 * out whole, then what comes is thrown away for a while, and only then the
 * connection ends. Both the time and the bytes have a bound.
 */
import type { IncomingMessage } from "node:http";
import { Readable } from "node:stream";

const LINGER_MS = 2_000;
const LINGER_BYTES = 64 * 1024 * 1024;

export function hasUnreadBody(request: IncomingMessage): boolean {
  if (request.complete || request.readableEnded) return false;
  const length = request.headers["content-length"];
  return request.headers["transfer-encoding"] !== undefined || (length !== undefined && Number(length) > 0);
}

/** `answer` at once; its end only when the client has stopped sending, or has been waited for long enough. */
export function lingering(answer: Buffer, request: IncomingMessage): Readable {
  async function* chunks(): AsyncGenerator<Buffer> {
    yield answer;
    await discard(request);
  }
  return Readable.from(chunks(), { objectMode: false });
}

function discard(request: IncomingMessage): Promise<void> {
  if (request.complete || request.destroyed) return Promise.resolve();
  return new Promise((resolve) => {
    let bytes = 0;
    const done = (): void => {
      clearTimeout(timer);
      request.off("data", count).off("end", done).off("close", done).off("error", done);
      // Someone must hear a late ECONNRESET, or it ends the process.
      request.on("error", () => {});
      request.pause();
      resolve();
    };
    const count = (chunk: Buffer): void => {
      bytes += chunk.length;
      if (bytes > LINGER_BYTES) done();
    };
    const timer = setTimeout(done, LINGER_MS);
    // Left by a reader that gave up; with it the stream would not flow.
    request.removeAllListeners("readable");
    request.on("data", count).on("end", done).on("close", done).on("error", done);
    request.resume();
  });
}
