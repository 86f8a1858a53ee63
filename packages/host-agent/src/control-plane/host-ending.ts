/**
 * The end of a host that was deleted: all that it has is destroyed, then its
 * credentials are forgotten, then the agent ends.
 *
 * Invariant: that the host has ended is durable before anything is destroyed,
 * so that a crash on the way, or something that would not go, is gone on with
 * at the next start.
 */
import { RookeryError } from "@rookery/protocol/errors";
import { sleep } from "../sandbox-manager/clock.ts";
import type { Clock } from "../sandbox-manager/clock.ts";
import type { Logger } from "../sandbox-manager/deps.ts";
import type { CredentialStore } from "./credentials.ts";

export const END_FAILPOINTS = ["end-host.mark", "end-host.destroy", "end-host.forget"] as const;

/** What does not go at once may be held by something that ends soon. */
const TRIES = 3;
const RETRY_MS = 5_000;

export interface HostEndingDeps {
  store: Pick<CredentialStore, "markEnded" | "forget">;
  /** Sandboxes and snapshots; goes on past failures and gives them back. */
  destroyEverything: () => Promise<readonly { id: string; error: Error }[]>;
  clock: Clock;
  logger: Logger;
  /** Failpoint, by its name. */
  reach: (name: string) => void | Promise<void>;
}

/** Why an agent ends that has no host any more. */
export class HostEnded extends Error {
  override readonly name = "HostEnded";

  constructor() {
    super("this host was deleted; nothing of it is left here, and its agent is not to be started again");
  }
}

export class HostEnding {
  readonly #deps: HostEndingDeps;
  readonly #over = new AbortController();
  #ending: Promise<void> | undefined;

  constructor(deps: HostEndingDeps) {
    this.#deps = deps;
  }

  /** Aborts when the agent is to end, whether everything went or not. */
  get signal(): AbortSignal {
    return this.#over.signal;
  }

  /** However often it is asked for, it happens once. Throws `host_error` when something is left. */
  async end(): Promise<void> {
    await (this.#ending ??= this.#end());
  }

  async #end(): Promise<void> {
    const { store, logger, reach } = this.#deps;
    try {
      logger.error({}, "this host was deleted: destroying all that is on it");
      await reach("end-host.mark.before");
      await store.markEnded();
      await reach("end-host.mark.after");
      await reach("end-host.destroy.before");
      const left = await this.#destroyAll();
      await reach("end-host.destroy.after");
      if (left > 0)
        throw new RookeryError("host_error", `${left} of what this host has could not be destroyed yet`);
      await reach("end-host.forget.before");
      await store.forget();
      await reach("end-host.forget.after");
      logger.info({}, "nothing of this host is left");
    } finally {
      this.#over.abort();
    }
  }

  async #destroyAll(): Promise<number> {
    const { destroyEverything, clock, logger } = this.#deps;
    for (let tries = 1; ; tries += 1) {
      const failures = await destroyEverything();
      for (const { id, error } of failures) logger.error({ id, err: error }, "could not be destroyed");
      if (failures.length === 0 || tries === TRIES) return failures.length;
      await sleep(clock, RETRY_MS, new AbortController().signal);
    }
  }
}
