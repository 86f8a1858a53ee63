/**
 * Who is killed first when memory runs out: user processes, never envd.
 *
 * A child starts with its parent's score, and a user process at -1000 would be
 * immortal. So envd takes 0 while it forks. The kernel keeps the value written
 * by a privileged process as the lowest that the child may set by itself.
 *
 * Lowering the score needs CAP_SYS_RESOURCE, which a container may lack that
 * envd's tests run in; there `lend` only calls its argument.
 */
import { closeSync, openSync, writeSync } from "node:fs";
import { errnoOf } from "../errors.ts";

export interface OomScore {
  /** Why envd is not protected, for the log. */
  readonly absence: string | undefined;
  /** Runs `fork` so that its children are as likely victims as any process. */
  lend<T>(fork: () => T): T;
}

export function protectFromOomKiller(): OomScore {
  const file = openSync("/proc/self/oom_score_adj", "w");
  try {
    writeSync(file, "-1000", 0);
  } catch (error) {
    closeSync(file);
    if (errnoOf(error) !== "EACCES") throw error;
    return { absence: "this process lacks CAP_SYS_RESOURCE", lend: (fork) => fork() };
  }
  return {
    absence: undefined,
    lend(fork) {
      writeSync(file, "0", 0);
      try {
        return fork();
      } finally {
        writeSync(file, "-1000", 0);
      }
    },
  };
}
