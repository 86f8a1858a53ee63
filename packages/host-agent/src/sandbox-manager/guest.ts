/**
 * What the manager needs of envd in a guest. `EnvdClient` (guest/) does it over
 * HTTP; the simulated guest does it in memory.
 */
import { RookeryError } from "@rookery/protocol/errors";
import type { RookeryErrorOptions } from "@rookery/protocol/errors";
import type { EnvdInit } from "../guest/envd-init.ts";
import type { EnvdTarget } from "./sandbox.ts";

export interface GuestAddress {
  host: string;
  port: number;
}

/** When a caller of a guest whose envd is away may call again: started again, it answers within about so long. */
const RETRY_AFTER_SEC = 3;

/**
 * Nothing of the call was done: envd takes no connection, or was started again
 * in its guest and does not know the host's token yet. It may be made again.
 */
export class NotServed extends RookeryError {
  constructor(message: string, options: RookeryErrorOptions = {}) {
    super("guest_error", message, { ...options, details: { retry_after_sec: RETRY_AFTER_SEC } });
  }
}

export interface GuestAgent {
  /**
   * Waits until envd of a VM that was just thawed answers, and gives the guest its
   * identity. Safe to repeat with the same `restoreId`.
   */
  init(address: GuestAddress, init: EnvdInit, signal: AbortSignal): Promise<void>;
  /**
   * Waits until envd answers, and says whether it takes the sandbox's token. One
   * that crashed and was started again in its guest takes none.
   */
  knowsToken(target: EnvdTarget, signal: AbortSignal): Promise<boolean>;
  /** Ends all connections to a VM that is gone. */
  release(address: GuestAddress): Promise<void>;
}
