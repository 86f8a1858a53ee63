/**
 * Hashes of what goes into an image.
 */
import { createHash } from "node:crypto";
import { createReadStream } from "node:fs";
import { readdir, stat } from "node:fs/promises";
import { join, relative } from "node:path";
import { pipeline } from "node:stream/promises";
import { z } from "zod";
import { readJson, writeFileAtomic } from "../host/atomic-file.ts";

/** Over names and values, in the order of the names. */
export function hashOf(inputs: Readonly<Record<string, string>>): string {
  const sorted = Object.entries(inputs).sort(([a], [b]) => (a < b ? -1 : 1));
  return createHash("sha256").update(JSON.stringify(sorted)).digest("hex");
}

export async function hashFile(path: string, signal: AbortSignal): Promise<string> {
  const hash = createHash("sha256");
  await pipeline(createReadStream(path, { highWaterMark: 1 << 20 }), hash, { signal });
  return hash.digest("hex");
}

/** Over paths, contents and executability of all files below `dir`. */
export async function hashTree(dir: string, signal: AbortSignal): Promise<string> {
  const entries = await readdir(dir, { recursive: true, withFileTypes: true });
  const files = entries
    .filter((entry) => !entry.isDirectory())
    .map((entry) => join(entry.parentPath, entry.name));
  const inputs: Record<string, string> = {};
  for (const file of files) {
    const executable = ((await stat(file)).mode & 0o100) !== 0;
    inputs[relative(dir, file)] = `${executable ? "x" : "-"} ${await hashFile(file, signal)}`;
  }
  return hashOf(inputs);
}

const hashCacheSchema = z.record(z.string(), z.object({ facts: z.string(), sha256: z.string() }));

/**
 * hashFile for big files that hardly ever change: the hash is kept in
 * `cacheFile` for as long as inode, size and times stay the same.
 */
export async function hashFileCached(path: string, cacheFile: string, signal: AbortSignal): Promise<string> {
  const { dev, ino, size, mtimeNs, ctimeNs } = await stat(path, { bigint: true });
  const facts = [dev, ino, size, mtimeNs, ctimeNs].join(" ");
  const cache = (await readCache(cacheFile, hashCacheSchema)) ?? {};
  const known = cache[path];
  if (known?.facts === facts) return known.sha256;
  const sha256 = await hashFile(path, signal);
  // One entry: yesterday's Node is of no use.
  await writeFileAtomic(cacheFile, JSON.stringify({ [path]: { facts, sha256 } }), { sync: false });
  return sha256;
}

/** A cache that is absent or unreadable (another version wrote it, power was lost) is an empty one. */
export async function readCache<S extends z.ZodType>(
  file: string,
  schema: S,
): Promise<z.output<S> | undefined> {
  try {
    return await readJson(file, schema);
  } catch {
    return undefined;
  }
}
