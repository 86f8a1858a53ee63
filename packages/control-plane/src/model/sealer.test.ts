import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import { test } from "vitest";
import { newSealer } from "./sealer.ts";

const plain = Buffer.from("what only we may read");

test("what was sealed opens again, and looks different each time", () => {
  const sealer = newSealer("k".repeat(32), randomBytes);
  const sealed = sealer.seal("cluster-secrets", plain);
  assert.deepEqual(sealer.open("cluster-secrets", sealed), plain);
  assert.notDeepEqual(sealed, sealer.seal("cluster-secrets", plain));
});

test("another key, another purpose, and any altered byte are refused", () => {
  const sealer = newSealer("k".repeat(32), randomBytes);
  const sealed = sealer.seal("cluster-secrets", plain);
  assert.throws(() => newSealer("x".repeat(32), randomBytes).open("cluster-secrets", sealed));
  assert.throws(() => sealer.open("idempotent-answer", sealed));
  for (let index = 0; index < sealed.length; index++) {
    const altered = Buffer.from(sealed);
    altered[index] = (altered[index] ?? 0) ^ 1;
    assert.throws(() => sealer.open("cluster-secrets", altered), `byte ${index}`);
  }
});

test("while keys change, what either sealed opens; what is sealed is the new one's alone", () => {
  const [old, next] = ["o".repeat(32), "n".repeat(32)];
  const sealedBefore = newSealer(old, randomBytes).seal("cluster-secrets", plain);
  const both = newSealer(next, randomBytes, [old]);
  assert.deepEqual(both.open("cluster-secrets", sealedBefore), plain);
  const sealedNow = both.seal("cluster-secrets", plain);
  assert.deepEqual(newSealer(next, randomBytes).open("cluster-secrets", sealedNow), plain);
  assert.throws(() => newSealer(old, randomBytes).open("cluster-secrets", sealedNow));
});
