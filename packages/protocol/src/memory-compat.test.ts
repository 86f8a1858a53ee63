import assert from "node:assert/strict";
import { test } from "vitest";
import { isLoadable, splitTscRate, withTscRate } from "./memory-compat.ts";

test("all must be equal but the rate, which may be measured a little differently", () => {
  const compat = withTscRate("abc", 2_096_023);
  assert.deepEqual(splitTscRate(compat), { text: "abc", tscKhz: 2_096_023 });
  for (const khz of [2_096_023, 2_096_022, 2_096_200, 2_095_850]) {
    assert.ok(isLoadable(compat, withTscRate("abc", khz)), `${khz}`);
  }
  for (const other of [withTscRate("abd", 2_096_023), withTscRate("abc", 2_100_000), "abc", ""]) {
    assert.ok(!isLoadable(compat, other), other);
    assert.ok(!isLoadable(other, compat), other);
  }
  assert.ok(isLoadable("abc", "abc"));
});
