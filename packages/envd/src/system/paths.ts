/**
 * Paths as clients write them, made absolute for one user.
 *
 *   ""          the default working directory, or the user's home
 *   ~  ~/x      the user's home
 *   x/y         below the user's home
 *   /x          as it stands: the kernel, not we, follows links and ".."
 *
 * Invariant: the result is absolute, has no NUL and at most PATH_MAX bytes.
 */
import { posix } from "node:path";
import { MAX_PATH_BYTES } from "../limits.ts";

export class PathError extends Error {
  override readonly name = "PathError";
}

export function resolvePath(path: string, { home, workdir }: { home: string; workdir?: string }): string {
  const wanted = path === "" ? (workdir ?? "") : path;
  const resolved = expand(wanted, home);
  if (resolved.includes("\0")) throw new PathError("path holds a NUL byte");
  if (Buffer.byteLength(resolved) > MAX_PATH_BYTES) {
    throw new PathError(`path is longer than ${MAX_PATH_BYTES} bytes`);
  }
  return resolved;
}

function expand(path: string, home: string): string {
  if (path === "") return home;
  if (path.startsWith("/")) return path;
  if (path === "~") return home;
  if (path.startsWith("~/")) return posix.join(home, path.slice(2));
  if (path.startsWith("~")) throw new PathError("cannot expand user-specific home dir");
  return posix.join(home, path);
}
