/**
 * Failpoints of what the control plane does with credentials: one before and one
 * after each line that changes something, in the order in which they are passed.
 * Unarmed unless the environment arms them (config.ts); never on a replica that
 * people use.
 */
import { failpointNames } from "@rookery/protocol/failpoints";

const steps = (...names: string[]): { name: string }[] => names.map((name) => ({ name }));

/** `answer` is the API's: before it is sent, and after all of it was handed to the system. */
export const CREDENTIAL_FAILPOINTS: readonly string[] = failpointNames({
  "register-host": steps("spend-token", "record-host", "end-old-tokens", "store-token", "commit", "answer"),
  "refresh-host": steps("store-successor", "mark-used", "prune", "commit", "answer"),
  "end-family": steps("delete-tokens", "raise-epoch", "commit"),
  "heartbeat-host": steps("record", "answer"),
  reseal: steps("cluster", "answer"),
});
