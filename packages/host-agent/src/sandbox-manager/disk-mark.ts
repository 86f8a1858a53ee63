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
import { setTimeout as delay } from "node:timers/promises";

/** `disk.json` is the driver's own: replaced when the chain changes, never by a guest. */
const MANIFEST = "disk.json";

/** The kernel's clock of file times ticks every 10 ms at the coarsest (HZ=100): within a tick two writes look like one. */
const SETTLE_MS = 20;

/** Only while nothing writes to the disk. */
export async function markDisk(dir: string): Promise<string> {
  for (;;) {
    const { mark, newestMs } = await readMark(dir);
    const waitMs = newestMs + SETTLE_MS - Date.now();
    // A time from the future was set by a clock that was turned back since; it will not come again.
    if (waitMs <= 0 || waitMs > SETTLE_MS) return mark;
    await delay(waitMs);
  }
}

async function readMark(dir: string): Promise<{ mark: string; newestMs: number }> {
  const entries = await readdir(dir, { withFileTypes: true, recursive: true });
  const files = entries.filter((entry) => entry.isFile() && entry.name !== MANIFEST);
  let newestMs = 0;
  const marks = await Promise.all(
    files.map(async ({ parentPath, name }) => {
      const path = join(parentPath, name);
      const { size, mtimeNs, mtimeMs, blocks } = await lstat(path, { bigint: true });
      newestMs = Math.max(newestMs, Number(mtimeMs));
      return `${relative(dir, path)}:${size}:${blocks}:${mtimeNs}`;
    }),
  );
  return { mark: marks.sort().join(","), newestMs };
}
