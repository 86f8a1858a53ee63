/** The use cases, put together. Here, and only here, a database that is away becomes a caller's error. */
import { RookeryError } from "@rookery/protocol/errors";
import { listApiKeys } from "../db/api-keys.ts";
import { asDatabaseError } from "../db/database.ts";
import { listSnapshots } from "../db/snapshots.ts";
import { listTeams } from "../db/teams.ts";
import { listTemplates } from "../db/templates.ts";
import { Authenticator } from "./authenticate.ts";
import { pauseSandbox, resumeSandbox } from "./command-sandbox.ts";
import { createSandbox } from "./create-sandbox.ts";
import { countStrangers } from "../db/host-strangers.ts";
import type { Deps } from "./deps.ts";
import { destroySandbox } from "./destroy-sandbox.ts";
import { demandPlatform } from "./errors.ts";
import { EventStreams } from "./event-streams.ts";
import { GuestCalls } from "./guest-calls.ts";
import * as hostLife from "./host-life.ts";
import * as hosts from "./hosts.ts";
import { idempotent } from "./idempotent.ts";
import { getSandbox, list, updateSandbox } from "./look-at-sandboxes.ts";
import { KnownHosts } from "./known-hosts.ts";
import type { Services } from "./services.ts";
import { createSnapshot, deleteSnapshot } from "./snapshots.ts";
import { createApiKey, createTeam, deleteApiKey } from "./teams-and-keys.ts";

export function openServices(given: Deps): Services {
  const { db } = given;
  const knownHosts = new KnownHosts(given);
  const deps: Deps = {
    ...given,
    onHostSeen: () => {
      knownHosts.forget();
      given.onHostSeen();
    },
  };
  const keys = new Authenticator(deps);
  const guests = new GuestCalls(deps);
  const events = new EventStreams(deps);
  return translated({
    authenticate: (presented) => keys.authenticate(presented),
    checkReady: async () => {
      if (!(await deps.isMigrated()))
        throw new RookeryError("unavailable", "The database is not migrated yet.");
    },
    idempotent: (caller, key, fingerprint, creation) =>
      idempotent(deps, { teamId: caller.teamId, key, fingerprint }, creation),

    createSandbox: (caller, input, held) => createSandbox(deps, knownHosts, caller, input, held),
    listSandboxes: (caller, input) => list(deps, caller, input),
    getSandbox: (caller, id) => getSandbox(deps, caller, id),
    updateSandbox: (caller, id, input) => updateSandbox(deps, caller, id, input),
    pauseSandbox: (caller, id) => pauseSandbox(deps, caller, id),
    resumeSandbox: (caller, id) => resumeSandbox(deps, knownHosts, caller, id),
    destroySandbox: (caller, id) => destroySandbox(deps, caller, id),
    pingSandbox: (caller, id) => guests.pingSandbox(caller, id),
    listSandboxEvents: (caller, id, page) => events.list(caller, id, page),
    followEvents: (caller, input, signal) => events.follow(caller, input, signal),
    exec: (caller, id, input, signal) => guests.exec(caller, id, input, signal),
    writeFile: (caller, id, path, content, signal) => guests.writeFile(caller, id, path, content, signal),
    readFile: (caller, id, path, signal) => guests.readFile(caller, id, path, signal),

    createSnapshot: (caller, input, held) => createSnapshot(deps, caller, input, held),
    listSnapshots: (caller, page) => listSnapshots(db, caller.teamId, page),
    deleteSnapshot: (caller, name) => deleteSnapshot(deps, caller, name),
    listTemplates: (caller, page) => listTemplates(db, caller.teamId, page),

    createApiKey: (caller, input, held) => createApiKey(deps, caller, input, held),
    listApiKeys: (caller, page) => listApiKeys(db, caller.teamId, page),
    deleteApiKey: (caller, id) => deleteApiKey(deps, keys, caller, id),
    createTeam: (caller, input, held) => createTeam(deps, caller, input, held),
    listTeams: async (caller, page) => {
      demandPlatform(caller, "Listing teams");
      return listTeams(db, page);
    },

    createHost: (caller, input, held) => hosts.createHost(deps, caller, input, held),
    newRegistrationToken: (caller, id) => hosts.newRegistrationToken(deps, caller, id),
    listHosts: (caller, page) => hosts.listHosts(deps, caller, page),
    getHost: (caller, id) => hosts.getHost(deps, caller, id),
    countStrangers: () => countStrangers(deps.db),
    updateHost: (caller, id, input) => hostLife.changeHost(deps, caller, id, input),
    setHostDraining: (caller, id, draining) => hostLife.changeHost(deps, caller, id, { draining }),
    revokeHost: (caller, id) => hostLife.revokeHost(deps, caller, id),
    previewHostDeletion: (caller, id) => hostLife.previewHostDeletion(deps, caller, id),
    deleteHost: (caller, id, options) => hostLife.deleteHost(deps, caller, id, options),
    registerHost: (input) => hosts.registerHost(deps, input),
    heartbeat: (accessToken, id, input) => hosts.heartbeat(deps, accessToken, id, input),
    refreshHostTokens: (refreshToken) => deps.credentials.refresh(refreshToken),
  });
}

/* oxlint-disable typescript/no-unsafe-type-assertion -- the same functions, each wrapped: their types stay */
function translated(services: Services): Services {
  const wrap =
    <A extends unknown[], R>(use: (...args: A) => Promise<R>) =>
    async (...args: A): Promise<R> => {
      try {
        return await use(...args);
      } catch (cause) {
        throw asDatabaseError(cause);
      }
    };
  return Object.fromEntries(
    Object.entries(services).map(([name, use]) => [
      name,
      wrap(use as (...args: unknown[]) => Promise<unknown>),
    ]),
  ) as unknown as Services;
}
