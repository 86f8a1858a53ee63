/**
 * Ids of the host agent's world, branded so that one kind never passes for
 * another. They are parsed once, at the border.
 */
export type SandboxId = string & { readonly __id: "sandbox" };
/** One VMM's place on this host: `vm` + 16 of [a-z0-9]. A sandbox gets a new one at each resume. */
export type VmId = string & { readonly __id: "vm" };
/** A read-only disk layer, `ly` + 16 of [a-z0-9]. */
export type LayerId = string & { readonly __id: "layer" };
export type SnapshotId = string & { readonly __id: "snapshot" };
/** SHA-256 (hex) over all inputs of a warm image. */
export type WarmKey = string & { readonly __id: "warm" };
/** Host-local index from which addresses and uids follow; 0 … maxSlots - 1. */
export type Slot = number & { readonly __id: "slot" };
