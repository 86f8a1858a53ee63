/**
 * The REST API as one Fastify application over the services.
 *
 * Requests pass, in this order: the path and query's encoding, who calls, the
 * body's reading, the schemas, the handler. Whatever fails, wherever, becomes an
 * answer in error-answer.ts.
 */
import helmet from "@fastify/helmet";
import { RookeryError } from "@rookery/protocol/errors";
import Fastify, { LogController } from "fastify";
import type { ZodTypeProvider } from "fastify-type-provider-zod";
import { randomUUID } from "node:crypto";
import { Registry } from "prom-client";
import type { Services } from "../service/services.ts";
import { authenticateRequests } from "./authentication.ts";
import { DEFAULT_LIMITS } from "./context.ts";
import { answerWhatIsCutShort } from "./cut-short.ts";
import type { Api, ApiLimits, ApiOptions } from "./context.ts";
import { answerClientError, answerError } from "./error-answer.ts";
import { acceptJson } from "./json-body.ts";
import { describeApi } from "./openapi.ts";
import { CONTENT_POLICY, servePages, sourceAssets } from "./pages.ts";
import { observeRequests } from "./request-log.ts";
import { eventRoutes } from "./routes/events.ts";
import { execRoutes } from "./routes/exec.ts";
import { readFileRoute, writeFileRoute } from "./routes/files.ts";
import { hostLifeRoutes } from "./routes/host-life.ts";
import { hostAgentRoutes, hostRoutes } from "./routes/hosts.ts";
import { operationRoutes } from "./routes/operations.ts";
import { sandboxRoutes } from "./routes/sandboxes.ts";
import { snapshotRoutes } from "./routes/snapshots.ts";
import { teamRoutes } from "./routes/teams.ts";
import { answerUnknownRoutes } from "./unknown-routes.ts";
import { compileSerializer, compileValidator } from "./validation.ts";

export type { Api, ApiOptions } from "./context.ts";

/** Not yet listening: call listen(), or inject() in tests. */
export async function buildApi(services: Services, options: ApiOptions): Promise<Api> {
  const limits = { ...DEFAULT_LIMITS, ...options.limits };
  const registry = options.metrics ?? new Registry();
  const app = openApp(options, limits);

  app.setValidatorCompiler(compileValidator);
  app.setSerializerCompiler(compileSerializer);
  app.setErrorHandler(answerError);
  answerUnknownRoutes(app);
  observeRequests(app, registry);
  app.addHook("onRequest", async (request, reply) => {
    reply.header("x-request-id", request.id).header("cache-control", "no-store");
  });
  await app.register(helmet, {
    contentSecurityPolicy: { useDefaults: false, directives: CONTENT_POLICY },
    // Whether clients come by TLS is the business of what stands before us.
    strictTransportSecurity: false,
  });
  refuseMalformedRequests(app);
  const closing = refuseWhenClosing(app);
  answerWhatIsCutShort(app);
  acceptJson(app, limits);
  await authenticateRequests(app, services, limits);
  await describeApi(app, options.version);

  await app.register(async (scope: Api) => {
    await sandboxRoutes(scope, services);
    await execRoutes(scope, services);
    await readFileRoute(scope, services);
    await snapshotRoutes(scope, services);
    await teamRoutes(scope, services);
    await hostRoutes(scope, services);
    await hostLifeRoutes(scope, services);
    await hostAgentRoutes(scope, services, options.reach);
    await eventRoutes(scope, { services, limits, closing });
    await operationRoutes(scope, services, registry);
  });
  await app.register((scope: Api) => writeFileRoute(scope, services, limits));
  await app.register((scope: Api) => servePages(scope, options.version, options.assets ?? sourceAssets()));
  return app;
}

function openApp(options: ApiOptions, limits: ApiLimits): Api {
  const app: Api = Fastify({
    loggerInstance: options.logger,
    logController: new LogController({ disableRequestLogging: true, requestIdLogLabel: "request" }),
    genReqId: () => randomUUID(),
    requestIdHeader: false,
    trustProxy: false,
    bodyLimit: limits.bodyBytes,
    keepAliveTimeout: limits.keepAliveTimeoutMs,
    // Uploads and long commands may take their time; bodies have limits of their own (json-body.ts, upload.ts).
    requestTimeout: 0,
    return503OnClosing: false,
    // So that an overlong id goes the way of every malformed one.
    routerOptions: { maxParamLength: limits.headerBytes },
    frameworkErrors: (error, request, reply) => {
      answerError(error, request, reply);
    },
    clientErrorHandler: answerClientError,
    http: {
      maxHeaderSize: limits.headerBytes,
      connectionsCheckingInterval: Math.min(5_000, limits.headersTimeoutMs),
    },
  }).withTypeProvider<ZodTypeProvider>();
  // Fastify sets the request's time-out after the headers' one, which takes it back.
  app.server.headersTimeout = limits.headersTimeoutMs;
  app.server.maxConnections = limits.connections;
  return app;
}

function refuseMalformedRequests(app: Api): void {
  app.addHook("onRequest", async ({ url, headers }) => {
    const query = url.indexOf("?");
    if (query !== -1 && url.includes("%", query)) {
      try {
        decodeURIComponent(url.slice(query));
      } catch (cause) {
        throw new RookeryError("invalid_request", "the query is not correctly percent-encoded", { cause });
      }
    }
    const encoding = headers["content-encoding"];
    if (encoding !== undefined && encoding !== "identity") {
      throw new RookeryError("unsupported_media_type", "send the body without a Content-Encoding");
    }
  });
}

/** Aborts when the server begins to close: streams end then, requests are finished. */
function refuseWhenClosing(app: Api): AbortSignal {
  const closing = new AbortController();
  app.addHook("preClose", async () => closing.abort());
  app.addHook("onRequest", async () => {
    if (closing.signal.aborted) throw new RookeryError("unavailable", "this server is shutting down");
  });
  return closing.signal;
}
