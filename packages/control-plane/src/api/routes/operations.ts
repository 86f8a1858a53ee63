/** For those who run it: is it alive, is it ready, and its figures. */
import { RookeryError } from "@rookery/protocol/errors";
import type { FastifyRequest } from "fastify";
import { Gauge } from "prom-client";
import type { Registry } from "prom-client";
import { z } from "zod";
import type { Services } from "../../service/services.ts";
import type { Api } from "../context.ts";

const Health = z.object({ status: z.literal("ok") }).meta({ id: "Health" });

export async function operationRoutes(app: Api, services: Services, registry: Registry): Promise<void> {
  const registers = [registry];
  const strangers = new Gauge({
    name: "rookery_stranger_sandboxes",
    help: "Sandboxes that hosts have and the database does not know",
    registers,
  });
  const untouched = new Gauge({
    name: "rookery_hosts_with_untouched_strangers",
    help: "Hosts with so many strangers that none is touched: is this the right database?",
    registers,
  });
  app.get(
    "/healthz",
    {
      config: { access: "public" },
      schema: {
        tags: ["operations"],
        operationId: "healthz",
        summary: "Alive",
        response: { 200: Health },
      },
    },
    async () => ({ status: "ok" as const }),
  );

  app.get(
    "/readyz",
    {
      config: { access: "public", errors: ["unavailable"] },
      schema: {
        tags: ["operations"],
        operationId: "readyz",
        summary: "Ready: the database answers and its migrations are done",
        response: { 200: Health },
      },
    },
    async () => {
      await services.checkReady();
      return { status: "ok" as const };
    },
  );

  app.get(
    "/metrics",
    {
      config: { access: "public", errors: ["forbidden"] },
      schema: {
        tags: ["operations"],
        operationId: "metrics",
        summary: "Figures in the format of Prometheus, for callers on the loopback address only",
        response: {
          200: { description: "The figures.", content: { "text/plain": { schema: z.string() } } },
        },
      },
    },
    async (request, reply) => {
      if (!isLocal(request)) {
        throw new RookeryError("forbidden", "figures are shown to callers on the loopback address only");
      }
      try {
        const { sandboxes, untouchedHosts } = await services.countStrangers();
        strangers.set(sandboxes);
        untouched.set(untouchedHosts);
      } catch (cause) {
        // Without its database all other figures matter the more.
        request.log.warn({ err: cause }, "strangers could not be counted");
      }
      return reply.type(registry.contentType).send(await registry.metrics());
    },
  );
}

/** A reverse proxy on this machine calls from the loopback address too, but says for whom. */
function isLocal({ raw, headers }: FastifyRequest): boolean {
  if (headers["x-forwarded-for"] !== undefined || headers.forwarded !== undefined) return false;
  const address = raw.socket.remoteAddress ?? "";
  return address === "::1" || /^(::ffff:)?127\./.test(address);
}
