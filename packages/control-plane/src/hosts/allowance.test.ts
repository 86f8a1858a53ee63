import assert from "node:assert/strict";
import { test } from "vitest";
import { Allowance } from "./allowance.ts";

test("a burst is free, then each has to wait for its turn", () => {
  const allowance = new Allowance({ burst: 3, perSec: 10, now: 0 });
  assert.deepEqual(
    [1, 2, 3, 4, 5].map(() => allowance.take(0)),
    [0, 0, 0, 100, 200],
  );
});

test("what is not used is had later, up to a burst", () => {
  const allowance = new Allowance({ burst: 2, perSec: 10, now: 0 });
  for (let taken = 0; taken < 2; taken++) allowance.take(0);
  assert.equal(allowance.take(100), 0);
  assert.deepEqual(
    [1, 2, 3].map(() => allowance.take(1_000_000)),
    [0, 0, 100],
  );
});

test("a clock that is set back gives nothing", () => {
  const allowance = new Allowance({ burst: 1, perSec: 10, now: 1000 });
  assert.equal(allowance.take(1000), 0);
  assert.equal(allowance.take(0), 100);
});
