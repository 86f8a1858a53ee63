/** /v1/snapshots and /v1/templates: what sandboxes are made from. */
// oxlint-disable oxc/no-async-endpoint-handlers -- it is Express that does not wait for them
import { RookeryError } from "@rookery/protocol/errors";
import { z } from "zod";
import { isSandboxId } from "../../model/ids.ts";
import type { Services } from "../../service/services.ts";
import { callerOf } from "../authentication.ts";
import type { Api } from "../context.ts";
import { answerOnce } from "../idempotency.ts";
import { renderSnapshot, renderSnapshotPage, renderTemplatePage } from "../render-snapshot.ts";
import { NoBody, PageQuery } from "../schemas/common.ts";
import {
  CreateSnapshot,
  Snapshot,
  SnapshotPage,
  SnapshotParams,
  TemplatePage,
} from "../schemas/snapshots.ts";

const tags = ["snapshots and templates"];

export async function snapshotRoutes(app: Api, services: Services): Promise<void> {
  app.post(
    "/v1/snapshots",
    {
      config: {
        access: "key",
        isIdempotent: true,
        errors: [
          "not_found",
          "wrong_state",
          "already_exists",
          "quota_exceeded",
          "host_error",
          "guest_error",
          "host_unreachable",
          "timeout",
          "out_of_disk",
        ],
      },
      schema: {
        tags,
        operationId: "createSnapshot",
        summary: "Make a snapshot of a running or paused sandbox, which keeps its state",
        body: CreateSnapshot,
        response: { 201: Snapshot },
      },
    },
    async (request, reply) =>
      answerOnce(services, request, reply, {
        make: async (held) => {
          const { sandbox_id: sandboxId, name, overwrite } = request.body;
          if (!isSandboxId(sandboxId)) throw new RookeryError("not_found", "there is no sandbox by this id");
          return services.createSnapshot(callerOf(request), { sandboxId, name, overwrite }, held);
        },
        render: renderSnapshot,
      }),
  );

  app.get(
    "/v1/snapshots",
    {
      config: { access: "key" },
      schema: {
        tags,
        operationId: "listSnapshots",
        summary: "List snapshots, newest first",
        querystring: PageQuery,
        response: { 200: SnapshotPage },
      },
    },
    async (request) => renderSnapshotPage(await services.listSnapshots(callerOf(request), request.query)),
  );

  app.delete(
    "/v1/snapshots/:name",
    {
      config: { access: "key", errors: ["host_error", "host_unreachable", "timeout"] },
      schema: {
        tags,
        operationId: "deleteSnapshot",
        summary: "Delete a snapshot",
        params: SnapshotParams,
        body: NoBody,
        response: { 204: z.undefined().describe("Gone.") },
      },
    },
    async (request, reply) => {
      await services.deleteSnapshot(callerOf(request), request.params.name);
      return reply.code(204).send();
    },
  );

  app.get(
    "/v1/templates",
    {
      config: { access: "key" },
      schema: {
        tags,
        operationId: "listTemplates",
        summary: "List the platform's templates and the team's snapshots",
        querystring: PageQuery,
        response: { 200: TemplatePage },
      },
    },
    async (request) => renderTemplatePage(await services.listTemplates(callerOf(request), request.query)),
  );
}
