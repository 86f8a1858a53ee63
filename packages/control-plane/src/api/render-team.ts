/** Teams and API keys, as JSON shows them. */
import type { z } from "zod";
import type { ApiKey, Page, Team } from "../service/services.ts";
import type { ApiKey as ApiKeySchema, ApiKeyPage, Team as TeamSchema, TeamPage } from "./schemas/teams.ts";

export function renderApiKey(apiKey: ApiKey): z.output<typeof ApiKeySchema> {
  return {
    id: apiKey.id,
    team_id: apiKey.teamId,
    name: apiKey.name,
    role: apiKey.role,
    prefix: apiKey.prefix,
    created_at: apiKey.createdAt.toISOString(),
    last_used_at: apiKey.lastUsedAt?.toISOString(),
  };
}

export function renderApiKeyPage({ items, nextCursor }: Page<ApiKey>): z.output<typeof ApiKeyPage> {
  return { items: items.map(renderApiKey), next_cursor: nextCursor };
}

export function renderTeam(team: Team): z.output<typeof TeamSchema> {
  return { id: team.id, name: team.name, created_at: team.createdAt.toISOString() };
}

export function renderTeamPage({ items, nextCursor }: Page<Team>): z.output<typeof TeamPage> {
  return { items: items.map(renderTeam), next_cursor: nextCursor };
}
