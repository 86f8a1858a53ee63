import assert from "node:assert/strict";
import { ftruncateSync } from "node:fs";
import { test } from "vitest";
import { Memfd } from "../../host/memfd.ts";
import { LoadedBase } from "./memory-base.ts";

test("a base can be read until its last user has released it, and not after", () => {
  const memfd = Memfd.create("rookery-test");
  ftruncateSync(memfd.fd, 1 << 20);
  const facts = {
    dir: "/nowhere",
    shape: { vcpus: 1, memoryMb: 1 },
    memorySha256: "",
    deviceStateSha256: "",
    fingerprint: "",
  };
  const stream = { whole: Buffer.alloc(0), memoryPrefix: Buffer.alloc(0) };
  const base = new LoadedBase(facts, memfd, stream);
  base.retain();
  base.release();
  assert.equal(base.bytes.length, 1 << 20);
  base.release();
  assert.throws(() => base.bytes, /released/);
  assert.throws(() => base.retain(), /released/);
});
