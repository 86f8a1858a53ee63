/** Who a request acts as: the user of its Basic credentials (without a password), or the guest's default user. */
import type { IncomingHttpHeaders } from "node:http";
import { Code, ConnectError } from "@connectrpc/connect";
import type { GuestState, Settings } from "./guest-state.ts";
import type { User, Users } from "./system/users.ts";

export interface Caller {
  user: User;
  settings: Settings;
}

export function callerOf(headers: IncomingHttpHeaders, deps: { state: GuestState; users: Users }): Caller {
  const settings = deps.state.settings;
  // /init of a new restore came between the check of the token and this line.
  if (settings === undefined) throw new ConnectError("envd is not initialised", Code.Unavailable);
  const named = basicUser(headers.authorization);
  const user = deps.users.find(named ?? settings.defaultUser);
  if (user !== undefined) return { user, settings };
  throw new ConnectError(
    named === undefined ? `invalid default user: '${settings.defaultUser}'` : `invalid username: '${named}'`,
    Code.Unauthenticated,
  );
}

function basicUser(authorization: string | undefined): string | undefined {
  const credentials = /^basic\s+([A-Za-z0-9+/=_-]*)$/i.exec(authorization ?? "")?.[1];
  if (credentials === undefined) return undefined;
  return Buffer.from(credentials, "base64").toString("utf8").split(":", 1)[0];
}
