/**
 * The seam to guest networks: one lease per VMM, named in full before any of
 * it exists, so that a crash at any line leaves nothing that cannot be found.
 *
 * Invariants: a slot has at most one live lease; everything that a driver makes
 * on the host bears a name that follows from the slot alone; every guest sees
 * the same address inside (`guest`), so clones of one warm image need no change.
 */
import type { Slot } from "../ids.ts";

/** What a VMM needs to give its guest a network card. */
export type GuestNic =
  | {
      kind: "tap";
      /** Path of the network namespace that the VMM must be started in. */
      netnsPath: string;
      tapName: string;
      mac: string;
    }
  | {
      kind: "user";
      mac: string;
      /** Loopback ports of the host, forwarded to the guest. */
      forwards: readonly { hostPort: number; guestPort: number }[];
    }
  /** A name for a guest that is not there. */
  | { kind: "simulated"; mac: string; port: number };

/** How the guest's only interface is configured; equal for all guests of a driver. */
export interface GuestAddressing {
  addressCidr: string;
  gateway: string;
  nameservers: readonly string[];
}

/** JSON-serialisable; it goes into the journal before `up`. */
export interface NetworkLease {
  driver: GuestNetworkDriver["kind"];
  slot: Slot;
  /** uid that may open the TAP. */
  uid: number;
  nic: GuestNic;
  /** Where the host reaches envd of the guest. */
  envdHost: string;
  envdPort: number;
}

export interface GuestNetworkDriver {
  readonly kind: "netns" | "user" | "simulated";
  readonly addressing: GuestAddressing;
  /** Can this driver work here? `reason` says why not, in words a person can act on. */
  probe(signal: AbortSignal): Promise<{ ok: boolean; reason?: string }>;
  /**
   * Makes what all leases of this agent share on the host, where there is such
   * a thing. Idempotent; before the first `plan`.
   */
  prepareHost?(signal: AbortSignal): Promise<void>;
  /** Undoes `prepareHost`, once no lease is up. Bears running twice, and in an agent that never prepared. */
  restoreHost?(signal: AbortSignal): Promise<void>;
  /** Names all that the lease will own. Makes nothing. */
  plan(slot: Slot, uid: number): NetworkLease;
  /** Makes it. Idempotent: half-made leases are completed or made anew. */
  up(lease: NetworkLease, signal: AbortSignal): Promise<void>;
  /** Removes it. Bears running twice, and after a half-done `up`. */
  down(lease: NetworkLease, signal: AbortSignal): Promise<void>;
  /** The same for a slot without a lease, whatever number `listOwnedSlots` found: a former agent may have had more of them. */
  downSlot(slot: Slot, signal: AbortSignal): Promise<void>;
  /** Slots of which something with our mark exists on this host: for recovery. */
  listOwnedSlots(signal: AbortSignal): Promise<Slot[]>;
}
