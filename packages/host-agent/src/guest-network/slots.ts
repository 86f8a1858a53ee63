/**
 * From a slot to its names, addresses and uid.
 *
 * All agents of a machine share two networks, cut into blocks of one size: an
 * agent claims one block (host-network.ts), and slot `i` of it has, with
 * `n = 2 * (block * slots + i)`:
 *
 *   link network  + n      the host's end of the veth pair
 *   link network  + n + 1  the namespace's end
 *   guest network + n + 1  the guest, as the host reaches it
 *
 * Names bear the agent's tag instead, so that what is found on a machine tells
 * whose it is whatever block it was made in.
 */
import { strict as assert } from "node:assert";
import { createHash } from "node:crypto";
import { realpath } from "node:fs/promises";
import type { Slot } from "../ids.ts";
import { formatIpv4, overlaps, parseIpv4, parseIpv4Block } from "./ipv4.ts";
import type { Ipv4Block } from "./ipv4.ts";

/** First of the uids that no convention gives to anyone (systemd's UIDS-GIDS.md), up to 0x7ffd_ffff. */
const FIRST_UID = 0x7000_0000;
export const MAX_SLOTS = 2048;

/** Four hex digits that tell this agent's things from those of another on the same machine. */
export type InstanceTag = string & { readonly __id: "instance-tag" };

export function isInstanceTag(text: string): text is InstanceTag {
  return /^[0-9a-f]{4}$/.test(text);
}

/** From the agent's data directory, which must exist. */
export async function instanceTagOf(dataDir: string): Promise<InstanceTag> {
  const digest = createHash("sha256")
    .update(await realpath(dataDir))
    .digest("hex");
  const tag = digest.slice(0, 4);
  assert(isInstanceTag(tag));
  return tag;
}

/** uids of an agent's VMMs: one a slot, 2048 for each tag, so that two agents never share one. */
export function uidOfSlot(tag: InstanceTag, slot: Slot): number {
  return FIRST_UID + Number.parseInt(tag, 16) * MAX_SLOTS + slot;
}

/** Name of the namespace and of the host's end of its veth pair; at most 15 characters. */
export function slotName(tag: InstanceTag, slot: Slot): string {
  return `${namePrefix(tag)}${slot}`;
}

/** What all names of an agent begin with. */
export function namePrefix(tag: InstanceTag): string {
  return `rk${tag}-`;
}

export function slotOfName(tag: InstanceTag, name: string): Slot | undefined {
  if (!name.startsWith(namePrefix(tag))) return undefined;
  const digits = name.slice(namePrefix(tag).length);
  const slot = Number(digits);
  return /^(0|[1-9]\d*)$/.test(digits) && isSlot(slot, MAX_SLOTS) ? slot : undefined;
}

export function isSlot(value: number, slots: number): value is Slot {
  return Number.isInteger(value) && value >= 0 && value < slots;
}

export interface SlotNetworks {
  guests: Ipv4Block;
  links: Ipv4Block;
  /** Slots a block. */
  slots: number;
}

export interface SlotAddresses {
  guest: string;
  hostLink: string;
  namespaceLink: string;
}

/** Checks that both networks have room for whole blocks. */
export function slotNetworks(options: { guestCidr: string; linkCidr: string; slots: number }): SlotNetworks {
  const { guestCidr, linkCidr, slots } = options;
  const networks = { guests: parseIpv4Block(guestCidr), links: parseIpv4Block(linkCidr), slots };
  if (!Number.isInteger(Math.log2(slots)) || slots > MAX_SLOTS) {
    throw new Error(`${slots} slots: must be a power of two of at most ${MAX_SLOTS}`);
  }
  if (overlaps(networks.guests, networks.links)) throw new Error(`${guestCidr} and ${linkCidr} overlap`);
  if (networks.guests.size !== networks.links.size)
    throw new Error(`${guestCidr} and ${linkCidr} differ in size`);
  if (networks.guests.size < 2 * slots) throw new Error(`${guestCidr} has no room for ${slots} slots`);
  return networks;
}

export function blockCount({ guests, slots }: SlotNetworks): number {
  return guests.size / (2 * slots);
}

/** Both networks' part that block `block` has. */
export function blockRanges(networks: SlotNetworks, block: number): { guests: Ipv4Block; links: Ipv4Block } {
  const size = 2 * networks.slots;
  return {
    guests: { first: networks.guests.first + block * size, size },
    links: { first: networks.links.first + block * size, size },
  };
}

export function slotAddresses(networks: SlotNetworks, block: number, slot: number): SlotAddresses {
  if (!isSlot(slot, networks.slots)) throw new Error(`slot ${slot}: there are ${networks.slots}`);
  const { guests } = blockRanges(networks, block);
  return addressesOfGuest(networks, formatIpv4(guests.first + 2 * slot + 1));
}

/** The way back, from the address that a lease names. */
export function addressesOfGuest(networks: SlotNetworks, guest: string): SlotAddresses {
  const offset = parseIpv4(guest) - networks.guests.first;
  if (offset < 0 || offset >= networks.guests.size || offset % 2 === 0) {
    throw new Error(`${guest}: is no guest's address`);
  }
  const namespaceLink = networks.links.first + offset;
  return { guest, hostLink: formatIpv4(namespaceLink - 1), namespaceLink: formatIpv4(namespaceLink) };
}

/**
 * Blocks that an agent may try, in order: those that neither another agent has
 * nor a route of the host leads into. Agents begin at different ones.
 */
export function freeBlocks(
  networks: SlotNetworks,
  options: { tag: InstanceTag; taken: ReadonlySet<number>; routes: readonly Ipv4Block[] },
): number[] {
  const count = blockCount(networks);
  const start = Number.parseInt(options.tag, 16) % count;
  return Array.from({ length: count }, (_, index) => (start + index) % count).filter((block) => {
    const { guests, links } = blockRanges(networks, block);
    return (
      !options.taken.has(block) &&
      options.routes.every((route) => !overlaps(route, guests) && !overlaps(route, links))
    );
  });
}
