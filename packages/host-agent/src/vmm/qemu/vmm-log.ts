/**
 * The VMM's own log: stdout and stderr of its launcher and of QEMU.
 *
 * It lies outside of the VMM's reach, but what QEMU prints may be up to the
 * guest: the file is cut when it has grown past its bound. (The VMM appends,
 * so that it goes on at the new end.)
 */
import { open, stat, truncate } from "node:fs/promises";
import { isErrno } from "../../host/errno.ts";

const MAX_LOG_BYTES = 1 << 20;
const TAIL_BYTES = 2048;

export async function logTail(path: string): Promise<string> {
  try {
    await using file = await open(path, "r");
    const { size } = await file.stat();
    const start = Math.max(0, size - TAIL_BYTES);
    const tail = Buffer.alloc(Math.min(size, TAIL_BYTES));
    const { bytesRead } = await file.read(tail, 0, tail.length, start);
    return tail.toString("utf8", 0, bytesRead).trim();
  } catch (cause) {
    if (isErrno(cause, "ENOENT")) return "";
    throw cause;
  }
}

export async function boundLog(path: string): Promise<void> {
  try {
    if ((await stat(path)).size > MAX_LOG_BYTES) await truncate(path, 0);
  } catch (cause) {
    if (!isErrno(cause, "ENOENT")) throw cause;
  }
}
