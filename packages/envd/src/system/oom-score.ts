/**
 * Who is killed first when memory runs out: user processes, never envd.
 *
 * A child starts with its parent's score, and a user process at -1000 would be
 * immortal; so the launcher gives it 0 before it becomes a user's. The kernel
 * keeps the value that a privileged process wrote as the lowest that a user
 * may choose.
 */
import { writeFileSync } from "node:fs";
import { errnoOf } from "../errors.ts";

export interface OomScore {
  /** What children are given; undefined: what envd has. */
  readonly ofChildren: string | undefined;
  /** Why envd is not protected, for the log. */
  readonly absence: string | undefined;
}

export function protectFromOomKiller(): OomScore {
  try {
    writeFileSync("/proc/self/oom_score_adj", "-1000");
  } catch (error) {
    // A container that envd's tests run in may lack the capability.
    if (errnoOf(error) !== "EACCES") throw error;
    return { ofChildren: undefined, absence: "this process lacks CAP_SYS_RESOURCE" };
  }
  return { ofChildren: "0", absence: undefined };
}
