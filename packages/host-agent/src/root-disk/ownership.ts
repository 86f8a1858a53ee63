/** Who may write a disk's file. */
import { chmod, lchown, lstat } from "node:fs/promises";

/**
 * Makes `path` belong to `uid` (user and group) with `mode`. An agent that is
 * not root has one uid for all, so then only the mode changes.
 */
export async function giveTo(path: string, uid: number, mode: number): Promise<void> {
  const { uid: owner, gid: group, mode: present } = await lstat(path);
  if (process.getuid?.() === 0 && (owner !== uid || group !== uid)) {
    await lchown(path, uid, uid);
  } else if ((present & 0o7777) === mode) {
    return;
  }
  await chmod(path, mode);
}
