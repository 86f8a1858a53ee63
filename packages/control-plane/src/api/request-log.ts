/**
 * One log line and one observation a request. Neither bears keys, bodies or
 * queries, and the figures know routes by template, never by a sandbox's id.
 */
import { collectDefaultMetrics, Histogram } from "prom-client";
import type { Registry } from "prom-client";
import type { Api } from "./context.ts";

const SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60];

export function observeRequests(app: Api, registry: Registry): void {
  if (registry.getSingleMetric("process_cpu_seconds_total") === undefined) {
    collectDefaultMetrics({ register: registry });
  }
  const duration = new Histogram({
    name: "rookery_http_request_duration_seconds",
    help: "From the request's headers to its answer's last byte, by route.",
    labelNames: ["method", "route", "status"],
    buckets: SECONDS,
    registers: [registry],
  });
  app.addHook("onResponse", async (request, reply) => {
    const route = request.is404 ? "unknown" : (request.routeOptions.url ?? "unknown");
    duration.observe(
      { method: request.is404 ? "any" : request.method, route, status: reply.statusCode },
      reply.elapsedTime / 1000,
    );
    request.log[route.startsWith("/v1/") ? "info" : "debug"](
      {
        method: request.method,
        route,
        ...(request.params === undefined ? {} : { params: request.params }),
        status: reply.statusCode,
        ms: Math.round(reply.elapsedTime * 10) / 10,
        ...(request.caller === null ? {} : { team: request.caller.teamId, key: request.caller.keyId }),
      },
      "request",
    );
  });
}
