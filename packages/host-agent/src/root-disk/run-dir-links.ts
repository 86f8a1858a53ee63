/**
 * Hard links of a disk's files in a VMM's run directory, which the VMM may
 * write: nothing that it put there under our names is used or followed.
 *
 * A link's name follows from its inode, so that linking again changes nothing
 * and two tops of one disk can lie side by side.
 */
import { link, lstat, readdir, unlink } from "node:fs/promises";
import { join } from "node:path";
import { RookeryError } from "@rookery/protocol/errors";
import { removeTree } from "../host/atomic-file.ts";
import { isErrno } from "../host/errno.ts";

const PREFIX = "disk-";

export async function linkNameOf(file: string): Promise<string> {
  const facts = await lstat(file);
  if (!facts.isFile()) throw new Error(`${file}: is not a regular file`);
  return `${PREFIX}${facts.ino}`;
}

/** Gives back the link's name in `runDir`. */
export async function linkInto(runDir: string, file: string): Promise<string> {
  const name = await linkNameOf(file);
  const target = join(runDir, name);
  try {
    await link(file, target);
  } catch (cause) {
    if (isErrno(cause, "EXDEV")) {
      throw new Error(`${runDir} and ${file} must lie on one file system`, { cause });
    }
    if (!isErrno(cause, "EEXIST")) throw cause;
    const [there, ours] = await Promise.all([lstat(target), lstat(file)]);
    if (there.ino !== ours.ino || there.dev !== ours.dev) {
      await removeLink(target);
      await link(file, target);
    }
  }
  return name;
}

/**
 * While the VMM may live: one name goes, whatever it is, and nothing is walked
 * into, since the VMM could exchange what lies there under our feet.
 */
export async function removeLink(path: string): Promise<void> {
  try {
    await unlink(path);
  } catch (cause) {
    if (isErrno(cause, "ENOENT")) return;
    if (!isErrno(cause, "EISDIR", "EPERM")) throw cause;
    throw new RookeryError("host_error", "A VMM put something else in the place of its disk.", { cause });
  }
}

/** Once the VMM is gone: whatever it left under our names goes. */
export async function removeLinks(runDir: string): Promise<void> {
  const names = await readdir(runDir).catch((cause: unknown) => {
    if (isErrno(cause, "ENOENT")) return [];
    throw cause;
  });
  for (const name of names) if (name.startsWith(PREFIX)) await removeTree(join(runDir, name));
}
