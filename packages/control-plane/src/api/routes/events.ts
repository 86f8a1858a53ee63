/** Events of sandboxes: as they happen, and those of one sandbox as a list. */
// oxlint-disable oxc/no-async-endpoint-handlers -- it is Express that does not wait for them
import type { Readable } from "node:stream";
import { z } from "zod";
import { callerOf } from "../authentication.ts";
import type { Api } from "../context.ts";
import { EVENT_STREAM, type EventStreamDeps, answerEventStream, wantsEventStream } from "../event-stream.ts";
import { renderSandboxEventPage } from "../render-event.ts";
import { PageQuery } from "../schemas/common.ts";
import { LastEventHeaders, SandboxEventPage } from "../schemas/events.ts";
import { SandboxParams } from "../schemas/sandboxes.ts";

const STREAM = `Server-sent events. \`event: sandbox\`: one change of a status, its data a SandboxEvent, its id the event's.
\`event: reset\`: events after \`Last-Event-ID\` are gone (they are kept for 7 days, unless configured otherwise);
the stream goes on after the id that comes with it, and whoever needs to know how things stand reads the lists.
A stream ends when the server restarts: come back with \`Last-Event-ID\`, as an EventSource does by itself.`;

const stream = z.custom<Readable>().meta({ type: "string", description: STREAM });

export async function eventRoutes(app: Api, deps: EventStreamDeps): Promise<void> {
  const { services } = deps;
  app.get(
    "/v1/events",
    {
      // A HEAD would be the start of a stream that never ends.
      exposeHeadRoute: false,
      config: { access: "key", errors: ["invalid_request", "quota_exceeded"] },
      schema: {
        tags: ["events"],
        operationId: "followEvents",
        summary: "Follow what happens to the team's sandboxes",
        description: "Without Last-Event-ID from now on.",
        headers: LastEventHeaders,
        response: {
          200: { description: "Until it is closed.", content: { [EVENT_STREAM]: { schema: stream } } },
        },
      },
    },
    async (request, reply) => {
      const after = idOf(request.headers["last-event-id"]);
      return answerEventStream(deps, request, reply, (signal) =>
        services.followEvents(callerOf(request), { after }, signal),
      );
    },
  );

  app.get(
    "/v1/sandboxes/:id/events",
    {
      exposeHeadRoute: false,
      config: { access: "key", errors: ["quota_exceeded"] },
      schema: {
        tags: ["events"],
        operationId: "listSandboxEvents",
        summary: "List a sandbox's events, newest first, or follow them",
        description: `With \`Accept: ${EVENT_STREAM}\` a stream, without Last-Event-ID from the oldest event on. It ends when the sandbox has; asked for once more it is a 204, at which an EventSource stops.`,
        params: SandboxParams,
        querystring: PageQuery,
        headers: LastEventHeaders,
        response: {
          200: {
            description: "A page, or the stream.",
            content: {
              "application/json": { schema: SandboxEventPage },
              [EVENT_STREAM]: { schema: stream },
            },
          },
          204: z.undefined().describe("The sandbox has ended, and the reader has had all of its events."),
        },
      },
    },
    async (request, reply) => {
      const { id } = request.params;
      if (!wantsEventStream(request)) {
        const page = await services.listSandboxEvents(callerOf(request), id, request.query);
        return reply.send(renderSandboxEventPage(page));
      }
      const after = idOf(request.headers["last-event-id"]);
      return answerEventStream(deps, request, reply, (signal) =>
        services.followEvents(callerOf(request), { sandboxId: id, after }, signal),
      );
    },
  );
}

const idOf = (header: string | undefined): bigint | undefined =>
  header === undefined ? undefined : BigInt(header);
