import { appendFileSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, expect, test } from "vitest";
import type { SandboxId } from "../ids.ts";
import { Tombstones } from "./tombstones.ts";

let dir: string;
beforeEach(() => {
  dir = mkdtempSync(join(tmpdir(), "rk-tombstones-"));
});
afterEach(() => rmSync(dir, { recursive: true, force: true }));

const idOf = (number: number) => `sb${String(number).padStart(18, "0")}` as SandboxId;
const open = (nowMs: number, maxCount = 1000) =>
  Tombstones.open(join(dir, "tombstones.jsonl"), { maxAgeMs: 1000, maxCount }, nowMs);

test("the highest generation is remembered, for a while", async () => {
  const first = await open(0);
  await first.add({ id: idOf(1), generation: 5n, destroyedAtMs: 0 });
  await first.add({ id: idOf(1), generation: 4n, destroyedAtMs: 500 });
  await first.close();
  appendFileSync(join(dir, "tombstones.jsonl"), '{"id":"sb');
  const second = await open(900);
  expect(second.get(idOf(1))?.generation).toBe(5n);
  await second.close();
  const third = await open(1001);
  expect(third.get(idOf(1))).toBeUndefined();
  await third.close();
});

test("there are never more than the bound, and the newest stay", async () => {
  const tombstones = await open(0, 10);
  for (let number = 0; number < 50; number += 1) {
    await tombstones.add({ id: idOf(number), generation: 1n, destroyedAtMs: 0 });
  }
  expect(tombstones.get(idOf(49))).toBeDefined();
  expect(tombstones.get(idOf(0))).toBeUndefined();
  const kept = Array.from({ length: 50 }, (_, number) => tombstones.get(idOf(number))).filter(Boolean);
  expect(kept.length).toBeLessThanOrEqual(10);
  await tombstones.close();
});
