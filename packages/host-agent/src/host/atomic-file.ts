/**
 * Files that are replaced as a whole: a reader sees the old bytes or the new,
 * whenever the machine or the agent dies.
 *
 * Invariant: a write leaves at most one temporary file behind, whose name
 * follows from the target's, so that the next write takes it away.
 */
import { constants } from "node:fs";
import { open, rename, rm } from "node:fs/promises";
import { basename, dirname, join, resolve } from "node:path";
import type { z } from "zod";

/** No file of ours that is read as a whole comes near this. */
const MAX_JSON_BYTES = 16 << 20;

/** Per target, the end of its last write: the temporary name has one writer at a time. */
const writing = new Map<string, Promise<void>>();

/** `sync: false` outlives the agent's death but not the machine's: that may leave the old bytes, the new, or none. */
export async function writeFileAtomic(
  path: string,
  data: string | Uint8Array,
  options: { mode?: number; sync?: boolean } = {},
): Promise<void> {
  const key = resolve(path);
  const before = writing.get(key) ?? Promise.resolve();
  const mine = before.then(() => replaceFile(key, data, options.mode ?? 0o600, options.sync ?? true));
  const settled = mine.then(
    () => undefined,
    () => undefined,
  );
  writing.set(key, settled);
  try {
    await mine;
  } finally {
    if (writing.get(key) === settled) writing.delete(key);
  }
}

async function replaceFile(
  path: string,
  data: string | Uint8Array,
  mode: number,
  sync: boolean,
): Promise<void> {
  const temporary = temporaryPathOf(path);
  await rm(temporary, { force: true });
  try {
    {
      await using file = await open(temporary, "wx", mode);
      await file.chmod(mode); // the umask took part in `open`
      await file.writeFile(data);
      if (sync) await file.sync();
    }
    await rename(temporary, path);
  } catch (cause) {
    await rm(temporary, { force: true });
    throw cause;
  }
  if (sync) await syncDirectory(dirname(path));
}

/** Where `writeFileAtomic(path)` prepares the new bytes. */
export function temporaryPathOf(path: string): string {
  return join(dirname(path), `.${basename(path)}.tmp`);
}

/** Throws ENOENT when absent, and an Error that names the file when it does not hold what `schema` says. */
export async function readJson<S extends z.ZodType>(path: string, schema: S): Promise<z.output<S>> {
  await using file = await open(path, constants.O_RDONLY | constants.O_NOFOLLOW);
  const { size } = await file.stat();
  if (size > MAX_JSON_BYTES) throw new Error(`${path}: ${size} bytes are more than any file of ours has`);
  let value: unknown;
  try {
    value = JSON.parse(await file.readFile("utf8"));
  } catch (cause) {
    throw new Error(`${path}: is not JSON`, { cause });
  }
  const parsed = schema.safeParse(value);
  if (!parsed.success) throw new Error(`${path}: is not what it should be: ${parsed.error.message}`);
  return parsed.data;
}

/** Removes a file or a tree, symbolic links as such. Bears running twice. Nobody may be writing in it. */
export async function removeTree(path: string): Promise<void> {
  await rm(path, { recursive: true, force: true });
}

/** Makes the names in a directory durable. */
export async function syncDirectory(path: string): Promise<void> {
  await using directory = await open(path, constants.O_RDONLY | constants.O_DIRECTORY);
  await directory.sync();
}
