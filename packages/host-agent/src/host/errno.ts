/** Telling the kernel's errors apart. */

/** Is `cause` a system error with one of `codes`, such as "ENOENT"? */
export function isErrno(cause: unknown, ...codes: string[]): cause is NodeJS.ErrnoException {
  return cause instanceof Error && "code" in cause && codes.includes(String(cause.code));
}

/** More links than any chain of ours has; one that bites its own tail ends here. */
const MAX_CAUSES = 16;

/** No space left, or none left for this user: is that what `error` comes from, through whatever it was wrapped in? */
export function comesFromFullDisk(error: unknown): boolean {
  let cause = error;
  for (let depth = 0; depth < MAX_CAUSES && cause instanceof Error; depth += 1) {
    if (isErrno(cause, "ENOSPC", "EDQUOT")) return true;
    cause = cause.cause;
  }
  return false;
}

/** For `catch`: undefined where the failure is one of these codes; any other goes on. */
export function ignoring(...codes: string[]): (cause: unknown) => undefined {
  return (cause) => {
    if (!isErrno(cause, ...codes)) throw cause;
    return undefined;
  };
}
