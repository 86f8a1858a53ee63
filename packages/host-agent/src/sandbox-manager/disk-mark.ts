/**
 * A mark of a disk's files as they are now, to tell later whether anything was
 * written to them.
 *
 * Every write changes a file's modification time; a change of owner, a link or
 * a rename does not. Equal marks within one boot therefore mean an untouched
 * disk, which a memory layer taken with it still fits. (After a power cut they
 * mean nothing: data may be there whose times are not.)
 */
import { lstat, readdir } from "node:fs/promises";
import { join, relative } from "node:path";

/** `disk.json` is the driver's own: replaced when the chain changes, never by a guest. */
const MANIFEST = "disk.json";

export async function markDisk(dir: string): Promise<string> {
  const entries = await readdir(dir, { withFileTypes: true, recursive: true });
  const files = entries.filter((entry) => entry.isFile() && entry.name !== MANIFEST);
  const marks = await Promise.all(
    files.map(async ({ parentPath, name }) => {
      const path = join(parentPath, name);
      const { size, mtimeNs, blocks } = await lstat(path, { bigint: true });
      return `${relative(dir, path)}:${size}:${blocks}:${mtimeNs}`;
    }),
  );
  return marks.sort().join(",");
}
