/**
 * Writes the archive that the kernel unpacks as its initrd: cpio, "newc"
 * (linux: Documentation/driver-api/early-userspace/buffer-format.rst).
 *
 * Our own because it is short, needs no tool of the host, makes device nodes
 * without privileges, and gives the same bytes for the same entries.
 */
export type CpioEntry =
  | { kind: "directory"; path: string; mode: number }
  | { kind: "file"; path: string; mode: number; data: Uint8Array }
  | { kind: "symlink"; path: string; target: string }
  | { kind: "character-device"; path: string; mode: number; major: number; minor: number };

const FILE_TYPE = { directory: 0o040000, file: 0o100000, symlink: 0o120000, "character-device": 0o020000 };

/** Parents must come before what is in them. Everything belongs to root, at time 0. */
export function writeCpio(entries: readonly CpioEntry[]): Buffer {
  const parts: Buffer[] = [];
  entries.forEach((entry, index) => {
    // Inode numbers only tell hard links apart: here every entry is its own.
    appendRecord(parts, entry, index + 1);
  });
  appendRecord(parts, { kind: "file", path: "TRAILER!!!", mode: 0, data: new Uint8Array() }, 0);
  return Buffer.concat(parts);
}

function appendRecord(parts: Buffer[], entry: CpioEntry, inode: number): void {
  const data = dataOf(entry);
  const name = Buffer.from(`${entry.path}\0`, "utf8");
  const device = entry.kind === "character-device" ? entry : { major: 0, minor: 0 };
  const permissions = entry.kind === "symlink" ? 0o777 : entry.mode;
  const isTrailer = inode === 0;
  const fields = [
    inode,
    isTrailer ? 0 : FILE_TYPE[entry.kind] | permissions,
    0, // uid
    0, // gid
    entry.kind === "directory" ? 2 : 1, // links
    0, // mtime
    data.length,
    0, // device of the file
    0,
    device.major,
    device.minor,
    name.length,
    0, // checksum: not in this variant
  ];
  const header = Buffer.from(`070701${fields.map((field) => field.toString(16).padStart(8, "0")).join("")}`);
  parts.push(header, name, padding(header.length + name.length), data, padding(data.length));
}

function dataOf(entry: CpioEntry): Buffer {
  if (entry.kind === "file") return Buffer.from(entry.data);
  if (entry.kind === "symlink") return Buffer.from(entry.target, "utf8");
  return Buffer.alloc(0);
}

/** Names and data end at multiples of four. */
function padding(length: number): Buffer {
  return Buffer.alloc((4 - (length % 4)) % 4);
}
