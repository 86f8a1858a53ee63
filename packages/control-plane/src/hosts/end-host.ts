/**
 * Tells a host that was deleted to end what it has. Best effort, within a limit:
 * what it does not hear now, its agent learns when its credentials are refused.
 */
import pLimit from "p-limit";
import type { HostEndpoint } from "../db/hosts.ts";
import type { SandboxId } from "../model/ids.ts";
import { type HostDeps, releaseVm } from "./settle.ts";
import { within } from "./within.ts";

/** Ends at once on one host. */
const PARALLEL = 8;

export async function endHost(
  deps: HostDeps,
  endpoint: HostEndpoint,
  stopped: readonly { id: SandboxId; generation: bigint }[],
  limitMs: number,
): Promise<void> {
  const agent = deps.pool.agent(endpoint);
  const limit = AbortSignal.timeout(limitMs);
  const gate = pLimit(PARALLEL);
  const releaseAll = Promise.all(
    stopped.map((row) =>
      gate(async () => {
        if (!limit.aborted) await releaseVm(deps, agent, row);
      }),
    ),
  );
  try {
    await within(limit, releaseAll);
  } catch (cause) {
    deps.log.warn(
      { err: cause, host: endpoint.id },
      "a deleted host did not end what it has; it will when it hears that it was deleted",
    );
  }
}
