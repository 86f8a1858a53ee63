/** What every driver of guest networks keeps. */
import { strict as assert } from "node:assert";
import { afterAll, beforeAll, describe, test } from "vitest";
import type { Slot } from "../ids.ts";
import type { GuestNetworkDriver } from "./guest-network.ts";
import { parseIpv4, parseIpv4Block, formatIpv4 } from "./ipv4.ts";

const signal = new AbortController().signal;

export function guestNetworkContract(
  name: string,
  options: { open: () => GuestNetworkDriver; uidOf: (slot: Slot) => number },
): void {
  describe(`${name}: the contract of guest networks`, () => {
    const driver = options.open();
    const plan = (value: number) => driver.plan(value as Slot, options.uidOf(value as Slot));
    beforeAll(() => driver.prepareHost?.(signal));
    afterAll(() => driver.restoreHost?.(signal));

    test("this machine can have such networks", async () => {
      const { ok, reason } = await driver.probe(signal);
      assert(ok, reason);
    });

    test("a plan is the same each time, survives JSON, and makes nothing", async () => {
      assert.deepEqual(plan(3), plan(3));
      assert.deepEqual(JSON.parse(JSON.stringify(plan(3))), plan(3));
      assert.deepEqual(await driver.listOwnedSlots(signal), []);
    });

    test("each slot's guest is reached at a place of its own", () => {
      const places = Array.from(
        { length: 100 },
        (_, slot) => `${plan(slot).envdHost}:${plan(slot).envdPort}`,
      );
      assert.equal(new Set(places).size, 100);
    });

    test("all guests are configured alike, with the gateway on their link", () => {
      const { addressCidr, gateway } = driver.addressing;
      const [address = "", prefix = ""] = addressCidr.split("/");
      const size = 2 ** (32 - Number(prefix));
      const link = parseIpv4Block(`${formatIpv4(Math.floor(parseIpv4(address) / size) * size)}/${prefix}`);
      assert(parseIpv4(gateway) >= link.first && parseIpv4(gateway) < link.first + link.size);
      assert.equal(plan(1).nic.mac, plan(2).nic.mac);
    });

    test("a slot that does not exist has no plan", () => {
      assert.throws(() => plan(1 << 20), /there are/);
      assert.throws(() => plan(-1), /there are/);
    });

    test("up and down bear running twice, and a slot can be used again", async () => {
      for (let round = 0; round < 2; round++) {
        await driver.up(plan(5), signal);
        await driver.up(plan(5), signal);
        await driver.down(plan(5), signal);
        await driver.down(plan(5), signal);
        assert.deepEqual(await driver.listOwnedSlots(signal), []);
      }
    });

    test("what was aborted says so and leaves nothing that down does not remove", async () => {
      const reason = new Error("enough");
      await assert.rejects(driver.up(plan(6), AbortSignal.abort(reason)), reason);
      await driver.down(plan(6), signal);
      assert.deepEqual(await driver.listOwnedSlots(signal), []);
    });

    test("slots go up and down side by side", async () => {
      const leases = [7, 8, 9].map(plan);
      await Promise.all(leases.map((lease) => driver.up(lease, signal)));
      const owned = await driver.listOwnedSlots(signal);
      assert(owned.length === 0 || owned.join() === "7,8,9", owned.join());
      await Promise.all(leases.map(({ slot }) => driver.downSlot(slot, signal)));
      assert.deepEqual(await driver.listOwnedSlots(signal), []);
    });
  });
}
