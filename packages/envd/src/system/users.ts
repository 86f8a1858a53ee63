/**
 * Users and groups of the guest, read from /etc/passwd and /etc/group: Node
 * has no call for it, and the guest has no other source of names.
 *
 * The files are the guest's to change, so they are read again when their
 * change time, size or inode differ, and only up to a bound.
 */
import { closeSync, fstatSync, openSync, readSync, statSync } from "node:fs";
import type { Stats } from "node:fs";

/** Beyond any real one; a larger file counts up to here. */
const MAX_DATABASE_BYTES = 4 * 1024 * 1024;

export interface User {
  readonly name: string;
  readonly uid: number;
  readonly gid: number;
  readonly home: string;
  /** All groups of the user, `gid` among them. */
  readonly groups: readonly number[];
}

interface Passwd {
  byName: Map<string, { uid: number; gid: number; home: string }>;
  nameOf: Map<number, string>;
}

interface Groups {
  nameOf: Map<number, string>;
  membersOf: Map<string, number[]>;
}

export class Users {
  readonly #passwd: Database<Passwd>;
  readonly #groups: Database<Groups>;

  constructor({ passwd = "/etc/passwd", group = "/etc/group" } = {}) {
    this.#passwd = new Database(passwd, parsePasswd);
    this.#groups = new Database(group, parseGroups);
  }

  find(name: string): User | undefined {
    const entry = this.#passwd.read().byName.get(name);
    if (entry === undefined) return undefined;
    const others = this.#groups.read().membersOf.get(name) ?? [];
    return { name, ...entry, groups: [...new Set([entry.gid, ...others])] };
  }

  /** The name, or the number in digits where there is none. */
  userName(uid: number): string {
    return this.#passwd.read().nameOf.get(uid) ?? String(uid);
  }

  groupName(gid: number): string {
    return this.#groups.read().nameOf.get(gid) ?? String(gid);
  }
}

class Database<T> {
  readonly #path: string;
  readonly #parse: (lines: string[][]) => T;
  #seen = "";
  #value: T;

  constructor(path: string, parse: (lines: string[][]) => T) {
    this.#path = path;
    this.#parse = parse;
    this.#value = parse([]);
  }

  read(): T {
    const version = versionOf(statSync(this.#path));
    if (version === this.#seen) return this.#value;
    const fd = openSync(this.#path, "r");
    try {
      const stat = fstatSync(fd);
      const buffer = Buffer.alloc(Math.min(stat.size, MAX_DATABASE_BYTES));
      let length = 0;
      while (length < buffer.byteLength) {
        const read = readSync(fd, buffer, length, buffer.byteLength - length, length);
        if (read === 0) break;
        length += read;
      }
      const lines = buffer.toString("utf8", 0, length).split("\n");
      this.#value = this.#parse(lines.map((line) => line.split(":")));
      this.#seen = versionOf(stat);
    } finally {
      closeSync(fd);
    }
    return this.#value;
  }
}

function versionOf(stat: Stats): string {
  return `${stat.dev}:${stat.ino}:${stat.size}:${stat.mtimeMs}:${stat.ctimeMs}`;
}

function parsePasswd(lines: string[][]): Passwd {
  const byName: Passwd["byName"] = new Map();
  const nameOf: Passwd["nameOf"] = new Map();
  for (const [name, , uidText, gidText, , home] of lines) {
    const uid = parseId(uidText);
    const gid = parseId(gidText);
    if (!name || uid === undefined || gid === undefined) continue;
    // The first line of a name or number counts, as in glibc.
    if (!byName.has(name)) byName.set(name, { uid, gid, home: home || "/" });
    if (!nameOf.has(uid)) nameOf.set(uid, name);
  }
  return { byName, nameOf };
}

function parseGroups(lines: string[][]): Groups {
  const nameOf: Groups["nameOf"] = new Map();
  const membersOf: Groups["membersOf"] = new Map();
  for (const [name, , gidText, members] of lines) {
    const gid = parseId(gidText);
    if (!name || gid === undefined) continue;
    if (!nameOf.has(gid)) nameOf.set(gid, name);
    for (const member of members?.split(",") ?? []) {
      const groups = membersOf.get(member);
      if (groups === undefined) membersOf.set(member, [gid]);
      else groups.push(gid);
    }
  }
  return { nameOf, membersOf };
}

/** 0 … 2^32 - 2: the last number is the kernel's "no change". */
function parseId(text: string | undefined): number | undefined {
  if (text === undefined || !/^\d{1,10}$/.test(text)) return undefined;
  const id = Number(text);
  return id < 2 ** 32 - 1 ? id : undefined;
}
