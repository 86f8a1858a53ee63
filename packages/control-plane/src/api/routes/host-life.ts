/** /v1/hosts/{id}: what its operator does to a host that is there. */
// oxlint-disable oxc/no-async-endpoint-handlers -- it is Express that does not wait for them
import { z } from "zod";
import type { HostId } from "../../model/ids.ts";
import type { Caller, Host as HostModel, Services } from "../../service/services.ts";
import { callerOf } from "../authentication.ts";
import type { Api } from "../context.ts";
import { renderHost, renderHostContents } from "../render-host.ts";
import { NoBody } from "../schemas/common.ts";
import { DeleteHostQuery, Host, HostContents, HostParams, UpdateHost } from "../schemas/hosts.ts";

const tags = ["hosts"];

export async function hostLifeRoutes(app: Api, services: Services): Promise<void> {
  app.patch(
    "/v1/hosts/:id",
    {
      config: { access: "key" },
      schema: {
        tags,
        operationId: "updateHost",
        summary: "Change its name or labels",
        params: HostParams,
        body: UpdateHost,
        response: { 200: Host },
      },
    },
    async (request) =>
      renderHost(await services.updateHost(callerOf(request), request.params.id, request.body)),
  );

  for (const [action, summary, act] of [
    [
      "drain",
      "Let it take no new sandboxes; those that it has stay",
      (caller, id) => services.setHostDraining(caller, id, true),
    ],
    ["undrain", "Let it take sandboxes again", (caller, id) => services.setHostDraining(caller, id, false)],
    [
      "revoke",
      "Cut its agent off at once: it needs a new registration token to come back",
      (caller, id) => services.revokeHost(caller, id),
    ],
  ] satisfies [string, string, (caller: Caller, id: HostId) => Promise<HostModel>][]) {
    app.post(
      `/v1/hosts/:id/${action}`,
      {
        config: { access: "key" },
        schema: {
          tags,
          operationId: `${action}Host`,
          summary,
          params: HostParams,
          body: NoBody,
          response: { 200: Host },
        },
      },
      async (request) => renderHost(await act(callerOf(request), request.params.id)),
    );
  }

  app.get(
    "/v1/hosts/:id/delete-preview",
    {
      config: { access: "key" },
      schema: {
        tags,
        operationId: "previewHostDeletion",
        summary: "What a forced deletion would end",
        params: HostParams,
        response: { 200: HostContents },
      },
    },
    async (request) =>
      renderHostContents(await services.previewHostDeletion(callerOf(request), request.params.id)),
  );

  app.delete(
    "/v1/hosts/:id",
    {
      config: { access: "key", errors: ["host_has_sandboxes"] },
      schema: {
        tags,
        operationId: "deleteHost",
        summary: "Delete it, if nothing would end with it",
        description:
          "`force=true` stops its sandboxes, deletes the snapshots that are nowhere else, and tells its agent to end; an agent that can't be reached is refused when it comes back.",
        params: HostParams,
        querystring: DeleteHostQuery,
        body: NoBody,
        response: { 204: z.undefined().describe("Gone.") },
      },
    },
    async (request, reply) => {
      const { force } = request.query;
      await services.deleteHost(callerOf(request), request.params.id, { force });
      return reply.code(204).send();
    },
  );
}
