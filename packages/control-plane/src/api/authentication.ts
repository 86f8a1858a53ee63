/**
 * Who calls, decided before anything of the body is read.
 *
 * A route's `access` says what it asks for; a route without one fails the start,
 * so none is open by oversight. Agents' routes are checked by their own token in
 * the service, which alone knows hosts.
 */
import type { RateLimitOptions } from "@fastify/rate-limit";
import rateLimit from "@fastify/rate-limit";
import { RookeryError } from "@rookery/protocol/errors";
import type { FastifyRequest } from "fastify";
import type { Caller, Services } from "../service/services.ts";
import type { Api, ApiLimits } from "./context.ts";

export async function authenticateRequests(app: Api, services: Services, limits: ApiLimits): Promise<void> {
  app.decorateRequest("caller", null);
  app.addHook("onRoute", ({ config, method, url }) => {
    if (config?.access === undefined)
      throw new Error(`${String(method)} ${url} does not say who may call it`);
  });
  const spend = await limitRate(app, limits);
  app.addHook("onRequest", async (request) => {
    const access = request.routeOptions.config.access;
    if (access !== "key" && access !== "platform") return;
    const caller = await authenticate(services, request);
    request.caller = caller;
    await spend(request);
    if (access === "platform" && caller.role !== "platform") {
      throw new RookeryError("forbidden", "this call needs a platform key");
    }
  });
}

/** Who holds the key that came with it, as things stand now. */
export function authenticate(services: Services, request: FastifyRequest): Promise<Caller> {
  return services.authenticate(keyOf(request));
}

/** Only on routes whose access is `key` or `platform`. */
export function callerOf(request: FastifyRequest): Caller {
  if (request.caller === null) throw new Error("a route without a key asked who calls");
  return request.caller;
}

function keyOf({ headers }: FastifyRequest): string {
  const key = headers["x-api-key"];
  if (typeof key === "string" && key !== "") return key;
  const bearer = bearerOf(headers.authorization);
  if (bearer !== undefined) return bearer;
  throw new RookeryError("unauthenticated", "give an API key in X-API-Key, or as Authorization: Bearer");
}

/** An agent's access token. */
export function accessTokenOf({ headers }: FastifyRequest): string {
  const token = bearerOf(headers.authorization);
  if (token === undefined)
    throw new RookeryError("invalid_token", "give the access token as Authorization: Bearer");
  return token;
}

function bearerOf(header: string | undefined): string | undefined {
  return /^Bearer +(\S+)$/i.exec(header ?? "")?.[1];
}

/** Counted by key after it proved good: invented keys can't push real ones out of the store. */
async function limitRate(app: Api, limits: ApiLimits): Promise<(request: FastifyRequest) => Promise<void>> {
  if (limits.requestsPerMinute === 0) return async () => {};
  const options: RateLimitOptions = {
    max: limits.requestsPerMinute,
    timeWindow: 60_000,
    keyGenerator: (request) => callerOf(request).keyId,
  };
  await app.register(rateLimit, { ...options, global: false });
  const spend = app.createRateLimit(options);
  return async (request) => {
    const verdict = await spend(request);
    if (verdict.isAllowed || !verdict.isExceeded) return;
    throw new RookeryError("rate_limited", `this key may make ${verdict.max} requests a minute`, {
      details: { retry_after_sec: verdict.ttlInSeconds },
    });
  };
}
