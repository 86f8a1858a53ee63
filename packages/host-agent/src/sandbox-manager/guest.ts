/**
 * What the manager needs of envd in a guest. `EnvdClient` (guest/) does it over
 * HTTP; the simulated guest does it in memory.
 */
import type { EnvdInit } from "../guest/envd-init.ts";

export interface GuestAddress {
  host: string;
  port: number;
}

export interface GuestAgent {
  /**
   * Waits until envd of a VM that was just thawed answers, and gives the guest its
   * identity. Safe to repeat with the same `restoreId`.
   */
  init(address: GuestAddress, init: EnvdInit, signal: AbortSignal): Promise<void>;
  /** Ends all connections to a VM that is gone. */
  release(address: GuestAddress): Promise<void>;
}
