/**
 * Tells a host that was deleted to end itself and all that it has. Best effort,
 * within a limit: what it does not hear now, its agent learns when its
 * credentials are refused.
 */
import type { HostEndpoint } from "../db/hosts.ts";
import type { HostDeps } from "./settle.ts";
import { within } from "./within.ts";

export async function endHost(deps: HostDeps, endpoint: HostEndpoint, limitMs: number): Promise<void> {
  const limit = AbortSignal.timeout(limitMs);
  try {
    await within(limit, deps.pool.agent(endpoint).endHost(limit));
  } catch (cause) {
    deps.log.warn(
      { err: cause, host: endpoint.id },
      "a deleted host did not end what it has; it will when it hears that it was deleted",
    );
  }
}
