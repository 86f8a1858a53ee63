/** Teams and the keys that act for them. A key is shown once: only its hash stays. */
import { RookeryError } from "@rookery/protocol/errors";
import { deleteApiKey as deleteKeyRow, insertApiKey } from "../db/api-keys.ts";
import type { Queryable } from "../db/database.ts";
import { findTeamByName, insertTeam } from "../db/teams.ts";
import type { ApiKeyId, TeamId } from "../model/ids.ts";
import { type Authenticator, hashKey } from "./authenticate.ts";
import type { Deps } from "./deps.ts";
import { demandPlatform } from "./errors.ts";
import type { Caller, HeldKey, NewApiKey, NewTeam, Role, Team } from "./services.ts";

const KEY_BYTES = 20;
const SHOWN_CHARS = 8;
const DEFAULT_TEAM = "default";

type Needs = Pick<Deps, "db" | "ids" | "random">;

export async function createApiKey(
  deps: Needs,
  caller: Caller,
  input: { name: string; role: Role },
  held?: HeldKey<NewApiKey>,
): Promise<NewApiKey> {
  if (input.role === "platform") demandPlatform(caller, "A platform key");
  return deps.db.transaction().execute(async (tx) => {
    const made = await makeKey(deps, tx, { teamId: caller.teamId, ...input });
    await held?.complete(tx, made.apiKey.id, made);
    return made;
  });
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
  held?: HeldKey<NewTeam>,
): Promise<NewTeam> {
  demandPlatform(caller, "Making a team");
  return deps.db.transaction().execute(async (tx) => {
    const team = await insertTeam(tx, { id: deps.ids.team(), name });
    if (!team) {
      throw new RookeryError("already_exists", `There is a team named ${name} already.`, {
        details: { field: "name" },
      });
    }
    const made = { team, ...(await makeKey(deps, tx, { teamId: team.id, name: "first", role: "member" })) };
    await held?.complete(tx, team.id, made);
    return made;
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
): Promise<NewApiKey> {
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
