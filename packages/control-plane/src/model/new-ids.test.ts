import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import { test } from "vitest";
import { isApiKeyId, isHostId, isSandboxId, isSnapshotId, isTeamId } from "./ids.ts";
import { newIds } from "./new-ids.ts";

test("each new id is one of its kind", () => {
  const ids = newIds(randomBytes);
  assert.ok(isSandboxId(ids.sandbox()));
  assert.ok(isSnapshotId(ids.snapshot()));
  assert.ok(isHostId(ids.host()));
  assert.ok(isTeamId(ids.team()));
  assert.ok(isApiKeyId(ids.apiKey()));
});

test("the same randomness gives the same id, and bytes that would bias it are thrown away", () => {
  let next = 0;
  const counting = (size: number): Uint8Array => Uint8Array.from({ length: size }, () => 240 + (next++ % 16));
  const text = newIds(counting).text(36);
  assert.equal(text, "yz0123456789".repeat(3));
});
