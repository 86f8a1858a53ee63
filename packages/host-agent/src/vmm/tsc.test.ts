import assert from "node:assert/strict";
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "vitest";
import { hostTscKhz, measureTscKhz } from "./tsc.ts";

const signal = new AbortController().signal;

test.skipIf(process.arch !== "x64")("two measurements of the counter agree", async () => {
  const [one, other] = [await measureTscKhz(signal), await measureTscKhz(signal)];
  assert.ok(one > 500_000 && one < 10_000_000, `${one} kHz`);
  assert.ok(Math.abs(one - other) / one < 200e-6, `${one} and ${other} kHz`);
});

test.skipIf(process.arch !== "x64")(
  "the first measurement is kept for as long as the counter confirms it",
  async () => {
    const dir = await mkdtemp(join(tmpdir(), "rk-tsc-"));
    const file = join(dir, "tsc.json");
    try {
      const first = await hostTscKhz(file, signal);
      assert.deepEqual(JSON.parse(await readFile(file, "utf8")), { tscKhz: first });
      assert.equal(await hostTscKhz(file, signal), first);
      await writeFile(file, JSON.stringify({ tscKhz: first * 2 }));
      assert.notEqual(await hostTscKhz(file, signal), first * 2);
    } finally {
      await rm(dir, { recursive: true, force: true });
    }
  },
);
