/** GET and POST /files: who may, as whom, where; the bytes are for download.ts and upload.ts. */
import type { IncomingMessage, ServerResponse } from "node:http";
import { HttpError } from "../errors.ts";
import type { GuestState, Settings } from "../guest-state.ts";
import { sendJson } from "../http-answer.ts";
import type { Native } from "../system/native.ts";
import { PathError, resolvePath } from "../system/paths.ts";
import type { User, Users } from "../system/users.ts";
import { sendFile } from "./download.ts";
import { checkSignature } from "./signature.ts";
import { receiveFiles } from "./upload.ts";

export interface FilesDeps {
  state: GuestState;
  users: Users;
  native: Native;
  now: () => number;
}

export async function getFile(
  request: IncomingMessage,
  response: ServerResponse,
  query: URLSearchParams,
  deps: FilesDeps,
): Promise<void> {
  const settings = authorize(request, query, "read", deps);
  const user = userOf(query, settings, deps.users);
  await sendFile(resolve(query.get("path") ?? "", user, settings), request, response);
}

export async function postFiles(
  request: IncomingMessage,
  response: ServerResponse,
  query: URLSearchParams,
  deps: FilesDeps,
): Promise<void> {
  const settings = authorize(request, query, "write", deps);
  const owner = userOf(query, settings, deps.users);
  const files = await receiveFiles(request, {
    owner,
    native: deps.native,
    path: query.get("path") ?? undefined,
    resolve: (path) => resolve(path, owner, settings),
  });
  sendJson(response, 200, files);
}

/** The token, or else a signature made with it. */
function authorize(
  request: IncomingMessage,
  query: URLSearchParams,
  operation: "read" | "write",
  { state, now }: FilesDeps,
): Settings {
  const settings = state.settings;
  if (settings === undefined) throw new HttpError(401, "envd is not initialised");
  const token = request.headers["x-access-token"];
  if (token === undefined || token === "") {
    checkSignature(
      {
        path: query.get("path") ?? "",
        operation,
        username: query.get("username") ?? "",
        signature: query.get("signature") ?? undefined,
        expiration: query.get("signature_expiration") ?? undefined,
      },
      settings.accessToken,
      now(),
    );
  } else if (!state.isAccessToken(String(token))) {
    throw new HttpError(401, "access token present in header but does not match");
  }
  return settings;
}

function userOf(query: URLSearchParams, settings: Settings, users: Users): User {
  const name = query.get("username") || settings.defaultUser;
  const user = users.find(name);
  if (user === undefined) throw new HttpError(401, `error looking up user '${name}': unknown user ${name}`);
  return user;
}

function resolve(path: string, user: User, settings: Settings): string {
  try {
    return resolvePath(path, { home: user.home, workdir: settings.defaultWorkdir });
  } catch (error) {
    if (!(error instanceof PathError)) throw error;
    throw new HttpError(400, `error resolving path: ${error.message}`, { cause: error });
  }
}
