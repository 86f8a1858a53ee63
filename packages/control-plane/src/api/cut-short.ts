/**
 * The end of a process that can wait no longer: whoever still waits for an
 * answer is told so, instead of losing the connection. What his request had
 * begun another replica settles; the same Idempotency-Key finds it again.
 */
import { RookeryError } from "@rookery/protocol/errors";
import type { FastifyReply, FastifyRequest } from "fastify";
import type { Api } from "./context.ts";
import { answerError } from "./error-answer.ts";

declare module "fastify" {
  interface FastifyInstance {
    /** Answers what is under way with 503. The process has to end right after. */
    cutShort: () => void;
  }
}

export function answerWhatIsCutShort(app: Api): void {
  const underWay = new Map<FastifyRequest, FastifyReply>();
  app.addHook("onRequest", async (request, reply) => {
    underWay.set(request, reply);
  });
  app.addHook("onResponse", async (request) => {
    underWay.delete(request);
  });
  app.addHook("onRequestAbort", async (request) => {
    underWay.delete(request);
  });
  app.decorate("cutShort", () => {
    for (const [request, reply] of underWay) {
      // An answer that has begun can only break off.
      if (reply.sent || reply.raw.headersSent) continue;
      const cause = new RookeryError(
        "unavailable",
        "This server is shutting down; what you asked for may still happen. Look again, or repeat it with the same Idempotency-Key.",
      );
      answerError(cause, request, reply.header("connection", "close"));
    }
  });
}
