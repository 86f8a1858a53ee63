/**
 * Idempotency-Key: the same key and body get the same answer for 24 h.
 *
 * That holds where the answer has a secret too: the services seal what they
 * store, and a caller who lost his answer gets it again instead of a second key.
 *
 * What counts as the same body is its meaning: the parsed fields, defaults filled
 * in, whatever their order and spacing were.
 */
import type { FastifyReply, FastifyRequest } from "fastify";
import { createHash } from "node:crypto";
import type { Services } from "../service/services.ts";
import { callerOf } from "./authentication.ts";
import { invalidField } from "./violations.ts";

export const IDEMPOTENCY_HEADER = "Idempotency-Key";
const KEY = /^[\x20-\x7e]{1,255}$/;

/** What `work` answers, or what it answered before: its status is set, its body returned. */
export async function answerOnce<T>(
  services: Services,
  request: FastifyRequest,
  reply: Pick<FastifyReply, "code">,
  work: () => Promise<{ status: number; body: T }>,
): Promise<T> {
  const key = keyOf(request);
  const answer =
    key === undefined
      ? await work()
      : await services.idempotent(callerOf(request), key, fingerprintOf(request), work);
  reply.code(answer.status);
  // oxlint-disable-next-line typescript/no-unsafe-type-assertion -- an answer of this same work, or stored of it
  return answer.body as T;
}

function keyOf({ headers }: FastifyRequest): string | undefined {
  const key = headers[IDEMPOTENCY_HEADER.toLowerCase()];
  if (key === undefined) return undefined;
  if (typeof key === "string" && KEY.test(key)) return key;
  throw invalidField(IDEMPOTENCY_HEADER, "must be 1 to 255 printable ASCII characters");
}

function fingerprintOf(request: FastifyRequest): string {
  const { method, url } = request.routeOptions;
  const meaning = JSON.stringify([method, url, request.body], (_key, value: unknown) => sorted(value));
  return createHash("sha256").update(meaning).digest("hex");
}

function sorted(value: unknown): unknown {
  if (typeof value !== "object" || value === null || Array.isArray(value)) return value;
  return Object.fromEntries(Object.entries(value).toSorted(([a], [b]) => (a < b ? -1 : 1)));
}
