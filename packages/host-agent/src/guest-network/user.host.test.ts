import { strict as assert } from "node:assert";
import { once } from "node:events";
import { createServer } from "node:net";
import { test } from "vitest";
import type { Slot } from "../ids.ts";
import { guestNetworkContract } from "./guest-network.contract.ts";
import { isInstanceTag } from "./slots.ts";
import { UserNetworks } from "./user.ts";

const tag = (process.pid & 0xffff).toString(16).padStart(4, "0");
assert(isInstanceTag(tag));
const signal = new AbortController().signal;

guestNetworkContract("user", { open: () => new UserNetworks({ tag, envdPort: 49_983 }), uidOf: () => 0 });

test("a port that someone else has is named when its slot is wanted", async () => {
  const networks = new UserNetworks({ tag, envdPort: 49_983 });
  const lease = networks.plan(11 as Slot, 0);
  const stranger = createServer().listen({ port: lease.envdPort, host: "127.0.0.1" });
  try {
    await once(stranger, "listening");
    await assert.rejects(networks.up(lease, signal), new RegExp(`port ${lease.envdPort} .* is in use`));
  } finally {
    stranger.close();
  }
  await once(stranger, "close");
  await networks.up(lease, signal);
});

test("more slots than there are ports are refused when configured", () => {
  assert.throws(() => new UserNetworks({ tag, slots: 20_000, envdPort: 1 }), /12768 ports/);
  assert.throws(() => new UserNetworks({ tag, firstPort: 65_400, envdPort: 1 }), /ports end at 65535/);
});
