import { strict as assert } from "node:assert";
import { test } from "vitest";
import { publicNameservers } from "./resolvers.ts";

test("public IPv4 nameservers are taken, at most two, and nothing else", () => {
  const text = [
    "# nameserver 9.9.9.9",
    "nameserver 127.0.0.53",
    "nameserver 10.255.255.53",
    "nameserver 999.1.1.1",
    "nameserver 2606:4700:4700::1111",
    "nameserver\t1.0.0.1 ",
    "nameserver 8.8.4.4",
    "nameserver 9.9.9.9",
    "search corp.example",
  ].join("\n");
  assert.deepEqual(publicNameservers(text), ["1.0.0.1", "8.8.4.4"]);
  assert.deepEqual(publicNameservers(""), []);
});
