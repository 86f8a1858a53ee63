/** Making folders with their parents, and reading them in depth. */
import { chownSync, mkdirSync, readdirSync, statSync } from "node:fs";
import { posix } from "node:path";
import { setImmediate } from "node:timers/promises";
import { errnoOf } from "../errors.ts";
import { LIST_SLICE, MAX_LIST_ENTRIES } from "../limits.ts";
import type { User } from "../system/users.ts";
import { readEntry } from "./entry.ts";
import type { Entry, EntryDeps } from "./entry.ts";

export class NotADirectoryError extends Error {
  override readonly name = "NotADirectoryError";
}

export class TooManyEntriesError extends Error {
  override readonly name = "TooManyEntriesError";
}

/** Makes `path` and what is missing above it, 0755 and owned by `owner`. What exists is left as it is. */
export function ensureDirectory(path: string, owner: User): void {
  try {
    if (statSync(path).isDirectory()) return;
    throw new NotADirectoryError(`path is a file: ${path}`);
  } catch (error) {
    if (errnoOf(error) === "ENOTDIR") throw new NotADirectoryError(`a parent is a file: ${path}`);
    if (errnoOf(error) !== "ENOENT") throw error;
  }
  const parent = posix.dirname(path);
  if (parent !== path) ensureDirectory(parent, owner);
  try {
    mkdirSync(path, 0o755);
  } catch (error) {
    // Another request made it meanwhile; or `path` ends in "/." and the parent was it.
    if (errnoOf(error) === "EEXIST" && statSync(path).isDirectory()) return;
    throw error;
  }
  chownSync(path, owner.uid, owner.gid);
}

/**
 * Entries below `path` to `depth`, in the order of a lexical walk. Links are
 * not followed, except `path` itself; entries keep the path as it was asked for.
 */
export async function listDirectory(
  path: string,
  { depth, signal, ...deps }: EntryDeps & { depth: number; signal: AbortSignal },
): Promise<Entry[]> {
  const entries: Entry[] = [];
  // A stack of what is still to be read, the next one last: no recursion as deep as a guest likes.
  const pending: { path: string; depth: number }[] = [];
  const read = (directory: string, level: number): void => {
    const children = readdirSync(directory, { withFileTypes: true });
    if (entries.length + pending.length + children.length > MAX_LIST_ENTRIES) {
      throw new TooManyEntriesError(`more than ${MAX_LIST_ENTRIES} entries: ask for less depth`);
    }
    const names = children.map(({ name }) => Buffer.from(name)).sort((a, b) => a.compare(b));
    for (const name of names.toReversed()) {
      pending.push({ path: posix.join(directory, name.toString()), depth: level });
    }
  };
  read(path, 1);
  for (let next = pending.pop(); next !== undefined; next = pending.pop()) {
    try {
      const entry = readEntry(next.path, deps);
      entries.push(entry);
      if (entry.permissions!.startsWith("d") && next.depth < depth) read(next.path, next.depth + 1);
    } catch (error) {
      // It went away while we walked.
      if (errnoOf(error) !== "ENOENT") throw error;
    }
    if (entries.length % LIST_SLICE === 0) {
      await setImmediate();
      signal.throwIfAborted();
    }
  }
  return entries;
}
