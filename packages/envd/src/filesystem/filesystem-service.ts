/**
 * filesystem.Filesystem of E2B's protocol. Like E2B's envd it acts as root and
 * gives what it makes to the caller's user: the token is what protects files.
 */
import { execFile } from "node:child_process";
import { lstatSync, renameSync, statSync } from "node:fs";
import { rm } from "node:fs/promises";
import { posix } from "node:path";
import { promisify } from "node:util";
import { Code, ConnectError } from "@connectrpc/connect";
import type { filesystem as wire } from "@rookery/protocol/envd";
import { callerOf } from "../caller.ts";
import type { Caller } from "../caller.ts";
import { connectErrorOf, errnoOf } from "../errors.ts";
import type { GuestState } from "../guest-state.ts";
import { MAX_LIST_DEPTH } from "../limits.ts";
import { PathError, resolvePath } from "../system/paths.ts";
import type { ServiceMethods } from "../rpc/connect-server.ts";
import type { RpcContext } from "../rpc/rpc-context.ts";
import { NotADirectoryError, TooManyEntriesError, ensureDirectory, listDirectory } from "./directories.ts";
import { readEntry } from "./entry.ts";
import type { EntryDeps } from "./entry.ts";

export interface FilesystemDeps extends EntryDeps {
  state: GuestState;
}

export function filesystemMethods(deps: FilesystemDeps): ServiceMethods<typeof wire.Filesystem> {
  function entryOf(path: string) {
    try {
      return readEntry(path, deps);
    } catch (error) {
      throw connectErrorOf(error, `file '${path}'`);
    }
  }

  async function list(path: string, depth: number, { signal }: RpcContext) {
    try {
      return await listDirectory(path, { depth, signal, users: deps.users, native: deps.native });
    } catch (error) {
      if (error instanceof TooManyEntriesError) {
        throw new ConnectError(error.message, Code.ResourceExhausted);
      }
      throw connectErrorOf(error, `error reading directory '${path}'`);
    }
  }

  return {
    stat: (request, context) => {
      const path = resolve(request.path, callerOf(context.headers, deps));
      return { entry: entryOf(path) };
    },

    makeDir: (request, context) => {
      const caller = callerOf(context.headers, deps);
      const path = resolve(request.path, caller);
      let isDirectory: boolean | undefined;
      try {
        isDirectory = statSync(path).isDirectory();
      } catch (error) {
        if (errnoOf(error) !== "ENOENT") throw connectErrorOf(error, `error reading '${path}'`);
      }
      if (isDirectory === true) {
        throw new ConnectError(`directory already exists: ${path}`, Code.AlreadyExists);
      }
      if (isDirectory === false) {
        throw invalid(`path already exists but it is not a directory: ${path}`);
      }
      makeDirectory(path, caller);
      return { entry: entryOf(path) };
    },

    move: async (request, context) => {
      const caller = callerOf(context.headers, deps);
      const source = resolve(request.source, caller);
      const destination = resolve(request.destination, caller);
      // Before parents are made for nothing.
      try {
        lstatSync(source);
      } catch (error) {
        throw connectErrorOf(error, `source '${source}'`);
      }
      makeDirectory(posix.dirname(destination), caller);
      try {
        await moveFile(source, destination);
      } catch (error) {
        throw connectErrorOf(error, `error renaming '${source}'`);
      }
      return { entry: entryOf(destination) };
    },

    listDir: async (request, context) => {
      const path = resolve(request.path, callerOf(context.headers, deps));
      const depth = Math.max(request.depth, 1);
      if (depth > MAX_LIST_DEPTH) throw invalid(`depth must not exceed ${MAX_LIST_DEPTH}`);
      let isDirectory: boolean;
      try {
        isDirectory = statSync(path).isDirectory();
      } catch (error) {
        throw connectErrorOf(error, `directory '${path}'`);
      }
      if (!isDirectory) throw invalid(`path is not a directory: ${path}`);
      return { entries: await list(path, depth, context) };
    },

    remove: async (request, context) => {
      const path = resolve(request.path, callerOf(context.headers, deps));
      try {
        await rm(path, { recursive: true, force: true });
      } catch (error) {
        throw connectErrorOf(error, `error removing file or directory '${path}'`);
      }
      return {};
    },

    // Their place in the protocol; what is behind it is not built yet.
    watchDir: () => {
      throw watchesUnimplemented();
    },
    createWatcher: () => {
      throw watchesUnimplemented();
    },
    getWatcherEvents: () => {
      throw watchesUnimplemented();
    },
    removeWatcher: () => {
      throw watchesUnimplemented();
    },
  };
}

function resolve(path: string, { user, settings }: Caller): string {
  try {
    return resolvePath(path, { home: user.home, workdir: settings.defaultWorkdir });
  } catch (error) {
    if (error instanceof PathError) throw invalid(error.message);
    throw error;
  }
}

function makeDirectory(path: string, { user }: Caller): void {
  try {
    ensureDirectory(path, user);
  } catch (error) {
    if (error instanceof NotADirectoryError) throw invalid(error.message);
    throw connectErrorOf(error, `error creating directory '${path}'`);
  }
}

/** Between file systems (a tmpfs, a mount) mv copies with owners, modes and attributes, which Node cannot. */
async function moveFile(source: string, destination: string): Promise<void> {
  try {
    renameSync(source, destination);
  } catch (error) {
    if (errnoOf(error) !== "EXDEV") throw error;
    await promisify(execFile)("mv", ["-T", "--", source, destination]);
  }
}

function invalid(message: string): ConnectError {
  return new ConnectError(message, Code.InvalidArgument);
}

function watchesUnimplemented(): ConnectError {
  return new ConnectError("watches are not supported yet", Code.Unimplemented);
}
