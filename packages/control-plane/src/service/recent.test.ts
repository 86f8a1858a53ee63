import assert from "node:assert/strict";
import { test } from "vitest";
import { Recent } from "./recent.ts";

test("what was learnt is known for its time, and no longer", () => {
  let now = 0;
  const recent = new Recent<number>({ size: 10, forMs: 100, now: () => now });
  recent.set("a", 1);
  now = 99;
  assert.equal(recent.get("a"), 1);
  now = 100;
  assert.equal(recent.get("a"), undefined);
});

test("the oldest is forgotten when there are too many, and one set again is young", () => {
  const recent = new Recent<number>({ size: 2, forMs: 100, now: () => 0 });
  recent.set("a", 1);
  recent.set("b", 2);
  recent.set("a", 3);
  recent.set("c", 4);
  assert.deepEqual([recent.get("a"), recent.get("b"), recent.get("c")], [3, undefined, 4]);
  recent.deleteWhere((value) => value === 3);
  assert.equal(recent.get("a"), undefined);
});
