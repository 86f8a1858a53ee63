/**
 * Reads a JSON body: within its limit, within its time, UTF-8 only, and without
 * `__proto__`. A body that announces itself too big is refused unread.
 */
import { RookeryError } from "@rookery/protocol/errors";
import type { FastifyRequest } from "fastify";
import type { IncomingMessage } from "node:http";
import type { Api, ApiLimits } from "./context.ts";
import { invalidField } from "./violations.ts";

const utf8 = new TextDecoder("utf-8", { fatal: true });

export function acceptJson(app: Api, limits: ApiLimits): void {
  app.removeAllContentTypeParsers();
  app.addContentTypeParser("application/json", async (_request: FastifyRequest, payload: IncomingMessage) => {
    const bytes = await readAll(payload, limits);
    if (bytes.length === 0) return undefined;
    return parseJson(bytes);
  });
}

function parseJson(bytes: Buffer): unknown {
  let text: string;
  try {
    text = utf8.decode(bytes);
  } catch (cause) {
    throw new RookeryError("invalid_request", "the body is not UTF-8", { cause });
  }
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (cause) {
    throw new RookeryError("invalid_request", "the body is not JSON", { cause });
  }
  if (MAY_NAME_PROTO.test(text)) refuseProto(value);
  return value;
}

/** Also the spellings by escapes; a false alarm costs a walk. */
const MAY_NAME_PROTO = /__proto__|\\u00/;

/** Not recursive: a body may be nested 500,000 deep. */
function refuseProto(root: unknown): void {
  const open = [root];
  for (let value = open.pop(); value !== undefined; value = open.pop()) {
    if (typeof value !== "object" || value === null) continue;
    if (Object.hasOwn(value, "__proto__")) throw invalidField("__proto__", "is not a field of any request");
    for (const child of Object.values(value)) {
      if (typeof child === "object" && child !== null) open.push(child);
    }
  }
}

async function readAll(payload: IncomingMessage, limits: ApiLimits): Promise<Buffer> {
  if (Number(payload.headers["content-length"]) > limits.bodyBytes) throw tooLarge(limits);
  const chunks: Buffer[] = [];
  let length = 0;
  await new Promise<void>((resolve, reject) => {
    const settle = (error?: Error): void => {
      clearTimeout(timer);
      payload.off("data", onData).off("end", onEnd).off("close", onClose).off("error", onClose);
      if (error === undefined) resolve();
      else reject(error);
    };
    const onData = (chunk: Buffer): void => {
      length += chunk.length;
      if (length > limits.bodyBytes) settle(tooLarge(limits));
      else chunks.push(chunk);
    };
    const onEnd = (): void => settle();
    const onClose = (): void => settle(new RookeryError("invalid_request", "the body ended early"));
    const timer = setTimeout(
      () => settle(new RookeryError("invalid_request", "the body did not arrive in time")),
      limits.bodyTimeoutMs,
    );
    payload.on("data", onData).on("end", onEnd).on("close", onClose).on("error", onClose);
  });
  return chunks.length === 1 && chunks[0] !== undefined ? chunks[0] : Buffer.concat(chunks, length);
}

function tooLarge({ bodyBytes }: ApiLimits): RookeryError {
  return new RookeryError("payload_too_large", `the body must be at most ${bodyBytes} bytes`, {
    details: { limit_bytes: bodyBytes },
  });
}
