/** Teams and their API keys, as the API speaks of them. */
import { z } from "zod";
import { ID_PATTERNS, isApiKeyId } from "../../model/ids.ts";
import { idOf, label, pageOf, Time } from "./common.ts";

const role = z.enum(["member", "platform"]);

export const ApiKeyParams = z.object({ id: idOf(isApiKeyId, ID_PATTERNS["api-key"]) });

export const CreateApiKey = z
  .strictObject({ name: label(128), role: role.default("member") })
  .meta({ id: "CreateApiKey" });

export const ApiKey = z
  .object({
    id: z.string(),
    team_id: z.string(),
    name: z.string(),
    role,
    prefix: z.string().describe("Its first 8 characters, for display."),
    created_at: Time,
    last_used_at: Time.optional(),
  })
  .meta({ id: "ApiKey" });

export const CreatedApiKey = z
  .object({ api_key: ApiKey, key: z.string().describe("Shown this once.") })
  .meta({ id: "CreatedApiKey" });

export const ApiKeyPage = pageOf(ApiKey).meta({ id: "ApiKeyPage" });

export const CreateTeam = z.strictObject({ name: label(128) }).meta({ id: "CreateTeam" });

export const Team = z.object({ id: z.string(), name: z.string(), created_at: Time }).meta({ id: "Team" });

export const CreatedTeam = z
  .object({ team: Team, api_key: ApiKey, key: z.string().describe("Of its first member; shown this once.") })
  .meta({ id: "CreatedTeam" });

export const TeamPage = pageOf(Team).meta({ id: "TeamPage" });
