/** Reads a StartRequest: from what a client sent to a program that may be started, or a Connect error. */
import { statSync } from "node:fs";
import { Code, ConnectError } from "@connectrpc/connect";
import type { process as wire } from "@rookery/protocol/envd";
import { errnoOf, systemMessage } from "../errors.ts";
import { MAX_ARGUMENT_BYTES, MAX_COMMAND_BYTES, MAX_PATH_BYTES, MAX_TAG_BYTES } from "../limits.ts";
import type { Settings } from "../guest-state.ts";
import { PathError, resolvePath } from "../system/paths.ts";
import type { User } from "../system/users.ts";
import type { ProcessFacts } from "./running-process.ts";
import type { ProgramSpec } from "./spawn.ts";

export function parseStartRequest(
  request: wire.StartRequest,
  { user, settings, path }: { user: User; settings: Settings; path: string },
): { spec: ProgramSpec; facts: ProcessFacts } {
  if (request.pty !== undefined) {
    throw new ConnectError("pseudo-terminals are not supported yet", Code.Unimplemented);
  }
  const { cmd = "", args = [], envs = {}, cwd } = request.process ?? {};
  if (cmd === "") throw invalid("process.cmd is empty");
  checkText("process.cmd", cmd, MAX_PATH_BYTES);
  let bytes = Buffer.byteLength(cmd);
  for (const arg of args) bytes += checkText("process.args", arg, MAX_ARGUMENT_BYTES) + 1;
  for (const [name, value] of Object.entries(envs)) {
    if (name === "" || name.includes("="))
      throw invalid("process.envs has a name that is empty or holds '='");
    bytes += checkText("process.envs", `${name}=${value}`, MAX_ARGUMENT_BYTES) + 1;
  }
  if (bytes > MAX_COMMAND_BYTES) throw invalid(`arguments and environment exceed ${MAX_COMMAND_BYTES} bytes`);
  if (request.tag !== undefined) checkText("tag", request.tag, MAX_TAG_BYTES);

  return {
    spec: {
      command: cmd,
      args,
      env: {
        PATH: path,
        HOME: user.home,
        USER: user.name,
        LOGNAME: user.name,
        ...settings.envVars,
        ...envs,
      },
      cwd: resolveCwd(cwd ?? "", user, settings),
      user,
      stdin: request.stdin ?? true,
    },
    facts: { command: cmd, args, envs, cwd, tag: request.tag },
  };
}

function resolveCwd(cwd: string, user: User, settings: Settings): string {
  let resolved: string;
  try {
    resolved = resolvePath(cwd, { home: user.home, workdir: settings.defaultWorkdir });
  } catch (error) {
    if (error instanceof PathError) throw invalid(`process.cwd: ${error.message}`);
    throw error;
  }
  let isDirectory: boolean;
  try {
    isDirectory = statSync(resolved).isDirectory();
  } catch (error) {
    if (errnoOf(error) === "ENOENT") throw invalid(`cwd '${resolved}' does not exist`);
    throw invalid(`cwd '${resolved}': ${systemMessage(error)}`);
  }
  if (!isDirectory) throw invalid(`cwd '${resolved}' is not a directory`);
  return resolved;
}

function checkText(field: string, text: string, maxBytes: number): number {
  if (text.includes("\0")) throw invalid(`${field} holds a NUL byte`);
  const bytes = Buffer.byteLength(text);
  if (bytes > maxBytes) throw invalid(`${field} is longer than ${maxBytes} bytes`);
  return bytes;
}

function invalid(message: string): ConnectError {
  return new ConnectError(message, Code.InvalidArgument);
}
