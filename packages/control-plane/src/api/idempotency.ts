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
import type { Creation, Services } from "../service/services.ts";
import { callerOf } from "./authentication.ts";
import { invalidField } from "./violations.ts";

export const IDEMPOTENCY_HEADER = "Idempotency-Key";
const CREATED = 201;
const KEY = /^[\x20-\x7e]{1,255}$/;

/** Makes something, once where there is a key, and answers 201 with its body. */
export async function answerOnce<Made, Body>(
  services: Services,
  request: FastifyRequest,
  reply: Pick<FastifyReply, "code">,
  creation: { make: Creation<Made>["make"]; render: (made: Made) => Body },
): Promise<Body> {
  const key = keyOf(request);
  if (key === undefined) {
    const made = await creation.make();
    reply.code(CREATED);
    return creation.render(made);
  }
  const answer = await services.idempotent(callerOf(request), key, fingerprintOf(request), {
    make: creation.make,
    answer: (made) => ({ status: CREATED, body: creation.render(made) }),
  });
  reply.code(answer.status);
  // oxlint-disable-next-line typescript/no-unsafe-type-assertion -- a body of this same route, now or stored
  return answer.body as Body;
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
