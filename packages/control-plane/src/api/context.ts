/**
 * What the API is given, and what its routes and requests carry: the limits,
 * who may call a route, and who called.
 */
import type { FastifyBaseLogger, FastifyInstance, RawServerDefault } from "fastify";
import type { ZodTypeProvider } from "fastify-type-provider-zod";
import type { IncomingMessage, ServerResponse } from "node:http";
import type { Registry } from "prom-client";
import type { ErrorCode } from "@rookery/protocol/errors";
import type { Caller } from "../service/services.ts";
import type { AssetDirectories } from "./pages.ts";

export interface ApiLimits {
  /** Of a JSON body. */
  bodyBytes: number;
  /** Of one file written. */
  fileBytes: number;
  /** Of all headers together. */
  headerBytes: number;
  /** For all headers of a request to arrive. */
  headersTimeoutMs: number;
  /** For a JSON body to arrive. */
  bodyTimeoutMs: number;
  /** How long an upload may bring nothing while we wait for it. */
  uploadStallMs: number;
  /** A stream of events that has nothing to say says so. */
  heartbeatMs: number;
  /** How long the reader of a stream may take nothing. */
  streamStallMs: number;
  /** An idle connection is closed after this. */
  keepAliveTimeoutMs: number;
  connections: number;
  /** Per API key; 0 turns the limit off. */
  requestsPerMinute: number;
}

export const DEFAULT_LIMITS: ApiLimits = {
  bodyBytes: 1024 * 1024,
  fileBytes: 5 * 1024 ** 3,
  headerBytes: 16 * 1024,
  headersTimeoutMs: 15_000,
  bodyTimeoutMs: 30_000,
  uploadStallMs: 60_000,
  heartbeatMs: 15_000,
  streamStallMs: 30_000,
  keepAliveTimeoutMs: 75_000,
  connections: 10_000,
  requestsPerMinute: 60_000,
};

export interface ApiOptions {
  logger: FastifyBaseLogger;
  /** Of the product, as /openapi.json and / say it. */
  version: string;
  limits?: Partial<ApiLimits>;
  /** Where the API's figures go, beside what others put there; /metrics shows all of it. */
  metrics?: Registry;
  /** Failpoint, by its name: before and after the answer of an `exchange`. */
  reach?: (name: string) => void | Promise<void>;
  /** Where the files of /docs and /test lie; absent: in the source tree. */
  assets?: AssetDirectories;
}

/** Who may call a route: anyone, a team's key, a platform key, or an agent by its own token. */
export type Access = "public" | "key" | "platform" | "agent";

declare module "fastify" {
  interface FastifyContextConfig {
    /** Every route says it; a route that doesn't fails the start. */
    access?: Access;
    /** The call takes an Idempotency-Key. */
    isIdempotent?: boolean;
    /** Codes besides those that its access, body and parameters imply. */
    errors?: readonly ErrorCode[];
    /** An agent's credentials change hands here: `NAME.answer` is a failpoint. */
    exchange?: string;
    /** Media types of a body that no schema reads, for the document. */
    rawBody?: Readonly<Record<string, object>>;
  }
  interface FastifyRequest {
    /** Set before any handler of a `key` or `platform` route; read it by callerOf(). */
    caller: Caller | null;
  }
}

export type Api = FastifyInstance<
  RawServerDefault,
  IncomingMessage,
  ServerResponse,
  FastifyBaseLogger,
  ZodTypeProvider
>;
