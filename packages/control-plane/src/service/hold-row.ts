/**
 * A row at work is held under a lease while a host is at it: renewed as long as
 * this process lives, so that a replica's death shows within a lease, however
 * long the work may take.
 */
import { type At, extendDeadline } from "../db/sandboxes.ts";
import type { Deps } from "./deps.ts";

export async function holdRow<T>(deps: Deps, row: At, work: () => Promise<T>): Promise<T> {
  const { leaseMs } = deps.options;
  const done = new AbortController();
  const renewing = renew(deps, row, leaseMs, done.signal);
  try {
    return await work();
  } finally {
    done.abort();
    await renewing;
  }
}

async function renew({ db, clock, log }: Deps, row: At, leaseMs: number, done: AbortSignal): Promise<void> {
  while (!done.aborted) {
    await clock.sleep(leaseMs / 3, done);
    if (done.aborted) return;
    try {
      // Somebody else moved it: there is nothing to hold any more.
      if (!(await extendDeadline(db, row, leaseMs))) return;
    } catch (cause) {
      log.warn({ err: cause, sandbox: row.id }, "the lease of a row at work was not renewed");
    }
  }
}
