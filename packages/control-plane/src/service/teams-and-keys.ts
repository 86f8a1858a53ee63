/** Teams and the keys that act for them. A key is shown once: only its hash stays. */
import { RookeryError } from "@rookery/protocol/errors";
import { deleteApiKey as deleteKeyRow, insertApiKey } from "../db/api-keys.ts";
import type { Queryable } from "../db/database.ts";
import { findTeamByName, insertTeam } from "../db/teams.ts";
import type { ApiKeyId, TeamId } from "../model/ids.ts";
import { type Authenticator, hashKey } from "./authenticate.ts";
import type { Deps } from "./deps.ts";
import { demandPlatform } from "./errors.ts";
import type { ApiKey, Caller, Role, Team } from "./services.ts";

const KEY_BYTES = 20;
const SHOWN_CHARS = 8;
const DEFAULT_TEAM = "default";

type Needs = Pick<Deps, "db" | "ids" | "random">;

export async function createApiKey(
  deps: Needs,
  caller: Caller,
  input: { name: string; role: Role },
): Promise<{ apiKey: ApiKey; key: string }> {
  if (input.role === "platform") demandPlatform(caller, "A platform key");
  return makeKey(deps, deps.db, { teamId: caller.teamId, ...input });
}

export async function deleteApiKey(
  deps: Pick<Deps, "db">,
  authenticator: Authenticator,
  caller: Caller,
  id: ApiKeyId,
): Promise<void> {
  const isDeleted = await deleteKeyRow(deps.db, caller.teamId, id);
  authenticator.forget(id);
  if (!isDeleted) throw new RookeryError("not_found", "There is no such API key.");
}

export async function createTeam(
  deps: Needs,
  caller: Caller,
  { name }: { name: string },
): Promise<{ team: Team; apiKey: ApiKey; key: string }> {
  demandPlatform(caller, "Making a team");
  return deps.db.transaction().execute(async (tx) => {
    const team = await insertTeam(tx, { id: deps.ids.team(), name });
    if (!team) {
      throw new RookeryError("already_exists", `There is a team named ${name} already.`, {
        details: { field: "name" },
      });
    }
    return { team, ...(await makeKey(deps, tx, { teamId: team.id, name: "first", role: "member" })) };
  });
}

/** For the operator of this cluster: the team `default`, and a platform key of it if asked for or if it is new. */
export async function bootstrap(
  deps: Needs,
  options: { newKey: boolean },
): Promise<{ team: Team; key: string | undefined }> {
  return deps.db.transaction().execute(async (tx) => {
    const made = await insertTeam(tx, { id: deps.ids.team(), name: DEFAULT_TEAM });
    const team = made ?? (await findTeamByName(tx, DEFAULT_TEAM));
    if (!team) throw new Error("the default team vanished");
    if (!made && !options.newKey) return { team, key: undefined };
    const { key } = await makeKey(deps, tx, { teamId: team.id, name: "platform", role: "platform" });
    return { team, key };
  });
}

async function makeKey(
  { ids, random }: Needs,
  db: Queryable,
  input: { teamId: TeamId; name: string; role: Role },
): Promise<{ apiKey: ApiKey; key: string }> {
  const hex = Buffer.from(random(KEY_BYTES)).toString("hex");
  const key = `rk_${hex}`;
  const apiKey = await insertApiKey(db, {
    ...input,
    id: ids.apiKey(),
    prefix: key.slice(0, SHOWN_CHARS),
    keyHash: hashKey(hex),
  });
  return { apiKey, key };
}
