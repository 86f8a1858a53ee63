import { strict as assert } from "node:assert";
import { test } from "vitest";
import { forwardDrops } from "./host-network.ts";

test("a firewall that drops what is forwarded is named, and one that does not is not", () => {
  const chain = (name: string, hook: string | undefined, policy: string | undefined) => ({
    chain: { family: "ip", table: "filter", name, handle: 1, type: "filter", hook, prio: 0, policy },
  });
  const ruleset = JSON.stringify({
    nftables: [
      { metainfo: { version: "1.0.6", json_schema_version: 1 } },
      chain("INPUT", "input", "drop"),
      chain("FORWARD", "forward", "drop"),
      chain("OTHER", "forward", "accept"),
      chain("DOCKER", undefined, undefined),
    ],
  });
  assert.deepEqual(forwardDrops(ruleset), ["chain ip filter FORWARD"]);
});
