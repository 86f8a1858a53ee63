import { strict as assert } from "node:assert";
import { mkdtemp, rmdir } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import * as fc from "fast-check";
import { test } from "vitest";
import type { Slot } from "../ids.ts";
import { overlaps, parseIpv4, parseIpv4Block } from "./ipv4.ts";
import {
  addressesOfGuest,
  blockCount,
  blockRanges,
  freeBlocks,
  instanceTagOf,
  isInstanceTag,
  MAX_SLOTS,
  slotAddresses,
  slotName,
  slotNetworks,
  slotOfName,
  uidOfSlot,
} from "./slots.ts";

const networks = slotNetworks({ guestCidr: "10.11.0.0/16", linkCidr: "10.12.0.0/16", slots: 1024 });
const slot = fc.integer({ min: 0, max: networks.slots - 1 }).map((value) => value as Slot);
const block = fc.integer({ min: 0, max: blockCount(networks) - 1 });
const tag = fc
  .integer({ min: 0, max: 0xffff })
  .map((value) => value.toString(16).padStart(4, "0"))
  .filter(isInstanceTag);

test("no two slots of a machine share an address", () => {
  const seen = new Set<string>();
  for (let index = 0; index < blockCount(networks); index++) {
    for (let value = 0; value < networks.slots; value++) {
      for (const address of Object.values(slotAddresses(networks, index, value))) {
        assert(!seen.has(address), address);
        seen.add(address);
      }
    }
  }
});

test("a slot's addresses lie in its block, its link is one /31, and all follow from the guest's", () => {
  fc.assert(
    fc.property(block, slot, (index, value) => {
      const addresses = slotAddresses(networks, index, value);
      const { guests, links } = blockRanges(networks, index);
      assert(overlaps(guests, parseIpv4Block(addresses.guest)));
      assert(overlaps(links, parseIpv4Block(addresses.hostLink)));
      assert(overlaps(parseIpv4Block(`${addresses.hostLink}/31`), parseIpv4Block(addresses.namespaceLink)));
      assert.deepEqual(addressesOfGuest(networks, addresses.guest), addresses);
    }),
  );
  assert.deepEqual(slotAddresses(networks, 0, 7), {
    guest: "10.11.0.15",
    hostLink: "10.12.0.14",
    namespaceLink: "10.12.0.15",
  });
});

test("addresses of no slot are refused", () => {
  assert.throws(() => slotAddresses(networks, 0, networks.slots), /there are 1024/);
  assert.throws(() => slotAddresses(networks, 0, -1), /there are 1024/);
  for (const address of ["10.11.0.14", "10.12.0.15", "10.10.255.255"]) {
    assert.throws(() => addressesOfGuest(networks, address), /no guest's address/);
  }
});

test("names tell the slot, fit an interface, and are another agent's to another agent", () => {
  fc.assert(
    fc.property(tag, tag, slot, (mine, other, value) => {
      const name = slotName(mine, value);
      assert(name.length <= 15);
      assert.equal(slotOfName(mine, name), value);
      if (mine !== other) assert.equal(slotOfName(other, name), undefined);
    }),
  );
  const fixed = "00ab";
  assert(isInstanceTag(fixed));
  for (const name of ["rk00ab-", "rk00ab-01", "rk00ab-1g", "rk00ab-probe", "rk00ab-99999", "eth0"]) {
    assert.equal(slotOfName(fixed, name), undefined);
  }
});

test("uids of two agents differ and stay below what the system keeps for itself", () => {
  fc.assert(
    fc.property(tag, tag, slot, slot, (one, other, a, b) => {
      assert.equal(uidOfSlot(one, a) === uidOfSlot(other, b), one === other && a === b);
      assert(uidOfSlot(one, a) < 0x7ffe_0000);
    }),
  );
});

test("a block that a route or another agent has is never offered, and every other is", () => {
  const route = fc
    .tuple(fc.integer({ min: 0, max: 2 ** 17 - 1 }), fc.integer({ min: 12, max: 32 }))
    .map(([offset, prefix]) => {
      const size = 2 ** (32 - prefix);
      const first = parseIpv4("10.11.0.0") + offset;
      return { first: first - (first % size), size };
    });
  fc.assert(
    fc.property(
      tag,
      fc.array(route, { maxLength: 4 }),
      fc.array(block, { maxLength: 5 }),
      (tag, routes, taken) => {
        const free = freeBlocks(networks, { tag, routes, taken: new Set(taken) });
        for (let index = 0; index < blockCount(networks); index++) {
          const { guests, links } = blockRanges(networks, index);
          const isBlocked =
            taken.includes(index) ||
            routes.some((route) => overlaps(route, guests) || overlaps(route, links));
          assert.equal(free.includes(index), !isBlocked);
        }
      },
    ),
  );
});

test("networks that do not fit are refused when configured", () => {
  const refused = (guestCidr: string, linkCidr: string, slots: number, why: RegExp): void =>
    assert.throws(() => slotNetworks({ guestCidr, linkCidr, slots }), why);
  refused("10.11.0.0/16", "10.12.0.0/16", 1000, /power of two/);
  refused("10.11.0.0/16", "10.12.0.0/16", 2 * MAX_SLOTS, /power of two/);
  refused("10.11.0.0/16", "10.11.128.0/17", 1024, /overlap/);
  refused("10.11.0.0/16", "10.12.0.0/17", 1024, /differ in size/);
  refused("10.11.0.0/24", "10.12.0.0/24", 1024, /no room/);
});

test("an agent's tag follows from where its data lies", async () => {
  const dir = await mkdtemp(join(tmpdir(), "rookery-tag-"));
  try {
    assert.equal(await instanceTagOf(dir), await instanceTagOf(`${dir}/.`));
    assert(isInstanceTag(await instanceTagOf(dir)));
  } finally {
    await rmdir(dir);
  }
});
