/** Telling the kernel's errors apart. */

/** Is `cause` a system error with one of `codes`, such as "ENOENT"? */
export function isErrno(cause: unknown, ...codes: string[]): cause is NodeJS.ErrnoException {
  return cause instanceof Error && "code" in cause && codes.includes(String(cause.code));
}
