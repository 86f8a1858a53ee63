import { strict as assert } from "node:assert";
import * as fc from "fast-check";
import { test } from "vitest";
import { formatIpv4, formatIpv4Block, isPublic, overlaps, parseIpv4, parseIpv4Block } from "./ipv4.ts";

const address = fc.integer({ min: 0, max: 0xffff_ffff });
const block = fc.tuple(address, fc.integer({ min: 0, max: 32 })).map(([bits, prefix]) => {
  const size = 2 ** (32 - prefix);
  return { first: bits - (bits % size), size };
});

test("addresses and blocks read back as they were written", () => {
  fc.assert(fc.property(address, (value) => assert.equal(parseIpv4(formatIpv4(value)), value)));
  fc.assert(fc.property(block, (value) => assert.deepEqual(parseIpv4Block(formatIpv4Block(value)), value)));
  assert.deepEqual(parseIpv4Block("10.1.2.3"), { first: parseIpv4("10.1.2.3"), size: 1 });
});

test("blocks overlap exactly when they have an address in common", () => {
  fc.assert(
    fc.property(block, block, (one, other) => {
      const first = Math.max(one.first, other.first);
      const end = Math.min(one.first + one.size, other.first + other.size);
      assert.equal(overlaps(one, other), first < end);
    }),
  );
});

test("what is no address or block is refused", () => {
  for (const text of ["", "1.2.3", "1.2.3.256", "1.2.3.4.5", "a.b.c.d", " 1.2.3.4", "0x1.2.3.4"]) {
    assert.throws(() => parseIpv4(text), /not an IPv4 address/);
  }
  for (const text of ["10.0.0.0/33", "10.0.0.0/-1", "10.0.0.0/", "10.0.0.1/8"])
    assert.throws(() => parseIpv4Block(text));
});

test("public means none of the special ranges", () => {
  for (const text of ["1.1.1.1", "8.8.8.8", "172.32.0.1", "100.128.0.1"])
    assert(isPublic(parseIpv4(text)), text);
  for (const text of [
    "10.1.1.1",
    "127.0.0.53",
    "169.254.169.254",
    "172.31.0.1",
    "100.64.0.1",
    "255.255.255.255",
  ]) {
    assert(!isPublic(parseIpv4(text)), text);
  }
});
