/** /v1/api-keys and /v1/teams. */
// oxlint-disable oxc/no-async-endpoint-handlers -- it is Express that does not wait for them
import { z } from "zod";
import type { NewApiKey, NewTeam, Services } from "../../service/services.ts";
import { callerOf } from "../authentication.ts";
import type { Api } from "../context.ts";
import { answerOnce } from "../idempotency.ts";
import { renderApiKey, renderApiKeyPage, renderTeam, renderTeamPage } from "../render-team.ts";
import { NoBody, PageQuery } from "../schemas/common.ts";
import {
  ApiKeyPage,
  ApiKeyParams,
  CreateApiKey,
  CreatedApiKey,
  CreatedTeam,
  CreateTeam,
  TeamPage,
} from "../schemas/teams.ts";

export async function teamRoutes(app: Api, services: Services): Promise<void> {
  app.post(
    "/v1/api-keys",
    {
      config: { access: "key", isIdempotent: true, errors: ["forbidden", "quota_exceeded"] },
      schema: {
        tags: ["teams and keys"],
        operationId: "createApiKey",
        summary: "Make an API key of the caller's team; the key is shown once",
        body: CreateApiKey,
        response: { 201: CreatedApiKey },
      },
    },
    async (request, reply) =>
      answerOnce(services, request, reply, {
        make: (held) => services.createApiKey(callerOf(request), request.body, held),
        render: ({ apiKey, key }: NewApiKey) => ({ api_key: renderApiKey(apiKey), key }),
      }),
  );

  app.get(
    "/v1/api-keys",
    {
      config: { access: "key" },
      schema: {
        tags: ["teams and keys"],
        operationId: "listApiKeys",
        summary: "List the team's API keys, newest first",
        querystring: PageQuery,
        response: { 200: ApiKeyPage },
      },
    },
    async (request) => renderApiKeyPage(await services.listApiKeys(callerOf(request), request.query)),
  );

  app.delete(
    "/v1/api-keys/:id",
    {
      config: { access: "key" },
      schema: {
        tags: ["teams and keys"],
        operationId: "deleteApiKey",
        summary: "Delete an API key: it is refused from then on",
        params: ApiKeyParams,
        body: NoBody,
        response: { 204: z.undefined().describe("Gone.") },
      },
    },
    async (request, reply) => {
      await services.deleteApiKey(callerOf(request), request.params.id);
      return reply.code(204).send();
    },
  );

  app.post(
    "/v1/teams",
    {
      config: { access: "platform", isIdempotent: true, errors: ["already_exists"] },
      schema: {
        tags: ["teams and keys"],
        operationId: "createTeam",
        summary: "Make a team and its first key, which is shown once",
        body: CreateTeam,
        response: { 201: CreatedTeam },
      },
    },
    async (request, reply) =>
      answerOnce(services, request, reply, {
        make: (held) => services.createTeam(callerOf(request), request.body, held),
        render: ({ team, apiKey, key }: NewTeam) => ({
          team: renderTeam(team),
          api_key: renderApiKey(apiKey),
          key,
        }),
      }),
  );

  app.get(
    "/v1/teams",
    {
      config: { access: "platform" },
      schema: {
        tags: ["teams and keys"],
        operationId: "listTeams",
        summary: "List teams, newest first",
        querystring: PageQuery,
        response: { 200: TeamPage },
      },
    },
    async (request) => renderTeamPage(await services.listTeams(callerOf(request), request.query)),
  );
}
