/** The failures that many use cases share, said the same way everywhere. */
import { RookeryError } from "@rookery/protocol/errors";
import type { SandboxStatus } from "../model/sandbox.ts";
import type { Caller } from "./services.ts";

export const noSandbox = (): RookeryError => new RookeryError("not_found", "There is no such sandbox.");

export function wrongState(status: SandboxStatus, wanted: string): RookeryError {
  return new RookeryError("wrong_state", `The sandbox is ${status}; ${wanted}.`, { details: { status } });
}

export const silentHost = (): RookeryError =>
  new RookeryError("host_unreachable", "The sandbox's host can't be reached; try again shortly.");

export function demandPlatform(caller: Caller, what: string): void {
  if (caller.role !== "platform") {
    throw new RookeryError("forbidden", `${what} needs a key with the role \`platform\`.`);
  }
}

/** What a sandbox's row shows of a failure. */
export function shownError(cause: unknown): { code: string; message: string } {
  return cause instanceof RookeryError
    ? { code: cause.code, message: cause.message }
    : { code: "internal", message: "The control plane failed." };
}
