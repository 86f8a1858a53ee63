/** HTTP as the run's own programs speak it: one connection for each request, so that each meets the network as it is. */
import { once } from "node:events";
import { type IncomingMessage, request } from "node:http";
import type { ApiAnswer } from "../world.ts";

export interface HttpCall {
  host: string;
  port: number;
  /** From which of this machine's addresses: filters know callers by it. */
  localAddress: string;
  method: string;
  path: string;
  headers: Readonly<Record<string, string | undefined>>;
  /** JSON, or nothing. */
  text: string;
  patienceMs: number;
}

/** Rejects when no whole answer came; nobody knows then whether it was carried out. */
export async function httpCall({ headers, text, patienceMs, ...way }: HttpCall): Promise<ApiAnswer> {
  const given = Object.entries(headers).filter(([, value]) => value !== undefined);
  const sending = request({
    ...way,
    signal: AbortSignal.timeout(patienceMs),
    agent: false,
    headers: {
      ...Object.fromEntries(given),
      ...(text !== "" && { "content-type": "application/json", "content-length": Buffer.byteLength(text) }),
    },
  });
  const answered = once(sending, "response") as Promise<[IncomingMessage]>;
  sending.end(text);
  const [response] = await answered;
  // A reset may come after the answer was read; nobody waits for that any more.
  sending.on("error", () => undefined);
  const body = await readText(response);
  return { status: response.statusCode ?? 0, body: body === "" ? undefined : JSON.parse(body) };
}

export async function readText(stream: AsyncIterable<unknown>): Promise<string> {
  const parts: Buffer[] = [];
  for await (const part of stream) parts.push(part as Buffer);
  return Buffer.concat(parts).toString("utf8");
}
