/**
 * What a client sees of one file. Of a link it shows the type and mode of its
 * target, and where the target really is; size, owner and times are the link's.
 */
import { lstatSync, realpathSync, statSync } from "node:fs";
import type { Stats } from "node:fs";
import { posix } from "node:path";
import type { MessageInitShape } from "@bufbuild/protobuf";
import { filesystem as wire } from "@rookery/protocol/envd";
import { errnoOf } from "../errors.ts";
import { readMetadata } from "../files/metadata.ts";
import type { Native } from "../system/native.ts";
import type { Users } from "../system/users.ts";

export type Entry = MessageInitShape<typeof wire.EntryInfoSchema>;

export interface EntryDeps {
  users: Users;
  native: Native;
}

/** Throws the system's error when `path` does not exist. */
export function readEntry(path: string, deps: EntryDeps): Entry {
  const stat = lstatSync(path);
  const link = stat.isSymbolicLink() ? followLink(path) : undefined;
  const shown = link === undefined ? stat : link.target;
  return {
    name: posix.basename(path),
    path,
    type: typeOf(shown),
    size: BigInt(stat.size),
    mode: (shown?.mode ?? 0) & 0o777,
    permissions: permissionsOf(stat),
    owner: deps.users.userName(stat.uid),
    group: deps.users.groupName(stat.gid),
    modifiedTime: timestampOf(stat.mtimeMs),
    symlinkTarget: link?.path,
    metadata: readMetadata(path, deps.native),
  };
}

/** Of a link that leads nowhere the path is the link's own, as E2B has it. */
function followLink(path: string): { path: string; target: Stats | undefined } {
  try {
    const target = realpathSync(path);
    return { path: target, target: statSync(target) };
  } catch (error) {
    if (["ENOENT", "ENOTDIR", "ELOOP", "EACCES"].includes(errnoOf(error) ?? "")) {
      return { path, target: undefined };
    }
    throw error;
  }
}

function typeOf(stat: Stats | undefined): wire.FileType {
  if (stat?.isFile()) return wire.FileType.FILE;
  if (stat?.isDirectory()) return wire.FileType.DIRECTORY;
  return wire.FileType.UNSPECIFIED;
}

/** Go's rendering of a mode: its letter for the kind, "-" for files, then rwx thrice. */
export function permissionsOf(stat: Stats): string {
  let kind = "-";
  if (stat.isDirectory()) kind = "d";
  else if (stat.isSymbolicLink()) kind = "L";
  else if (stat.isFIFO()) kind = "p";
  else if (stat.isSocket()) kind = "S";
  else if (stat.isBlockDevice()) kind = "D";
  else if (stat.isCharacterDevice()) kind = "Dc";
  const flags = "rwxrwxrwx";
  const bits = Array.from(flags, (letter, index) => (stat.mode & (1 << (8 - index)) ? letter : "-"));
  return kind + bits.join("");
}

function timestampOf(ms: number): { seconds: bigint; nanos: number } {
  const seconds = Math.floor(ms / 1000);
  const nanos = Math.min(Math.floor((ms - seconds * 1000) * 1e6), 999_999_999);
  return { seconds: BigInt(seconds), nanos };
}
