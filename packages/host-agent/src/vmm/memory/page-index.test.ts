import assert from "node:assert/strict";
import fc from "fast-check";
import { test } from "vitest";
import { dataBytes, decodeIndex, encodeIndex, PAGE_BYTES, pushPages, type PageRange } from "./page-index.ts";
import { groupRanges, keepDifferences } from "./private-pages.ts";

const MEMORY_BYTES = 1024 * PAGE_BYTES;

/** Ascending ranges within the memory. */
const anyRanges = fc
  .array(fc.tuple(fc.nat(20), fc.integer({ min: 1, max: 20 }), fc.constantFrom("data", "zero")), {
    maxLength: 30,
  })
  .map((parts) => {
    const ranges: PageRange[] = [];
    let at = 0;
    for (const [gap, pages, kind] of parts) {
      at += gap;
      if (at + pages > 1024) break;
      pushPages(ranges, at, pages, kind);
      at += pages;
    }
    return ranges;
  });

test("what was encoded is decoded", () => {
  fc.assert(
    fc.property(anyRanges, (ranges) => {
      const index = { memoryBytes: MEMORY_BYTES, ranges };
      assert.deepEqual(decodeIndex(encodeIndex(index), MEMORY_BYTES), index);
    }),
  );
});

test("an index that does not fit its memory, or was changed, is refused or still in bounds", () => {
  const good = encodeIndex({ memoryBytes: MEMORY_BYTES, ranges: [{ firstPage: 3, pages: 2, kind: "data" }] });
  assert.throws(() => decodeIndex(good, 2 * MEMORY_BYTES), /another memory size/);
  assert.throws(() => decodeIndex(good.subarray(0, -1), MEMORY_BYTES), /wrong length/);
  assert.throws(() => decodeIndex(Buffer.alloc(0), MEMORY_BYTES), /no index/);
  const overlapping = [
    { firstPage: 3, pages: 2, kind: "data" as const },
    { firstPage: 4, pages: 1, kind: "zero" as const },
  ];
  assert.throws(
    () => decodeIndex(encodeIndex({ memoryBytes: MEMORY_BYTES, ranges: overlapping }), MEMORY_BYTES),
    /order/,
  );
  fc.assert(
    fc.property(fc.nat(good.length - 1), fc.nat(255), (at, byte) => {
      const changed = Buffer.from(good);
      changed[at] = byte;
      let ranges: readonly PageRange[];
      try {
        ({ ranges } = decodeIndex(changed, MEMORY_BYTES));
      } catch {
        return;
      }
      for (const range of ranges) assert.ok((range.firstPage + range.pages) * PAGE_BYTES <= MEMORY_BYTES);
    }),
  );
});

test("groups hold all pages once, in order, and none is larger than asked for", () => {
  fc.assert(
    fc.property(anyRanges, fc.integer({ min: 1, max: 50 }), (ranges, most) => {
      const regrouped: PageRange[] = [];
      for (const group of groupRanges(ranges, most)) {
        assert.ok(group.reduce((sum, range) => sum + range.pages, 0) <= most);
        for (const { firstPage, pages, kind } of group) pushPages(regrouped, firstPage, pages, kind);
      }
      assert.deepEqual(regrouped, ranges);
    }),
  );
});

test("only pages that differ from the base are kept, and empty ones without bytes", async () => {
  const base = Buffer.alloc(16 * PAGE_BYTES, 7);
  base.fill(0, 15 * PAGE_BYTES);
  // Pages 2..4 and 14..15: same as the base, other bytes, empty; same, same.
  const copied = Buffer.concat([
    Buffer.alloc(PAGE_BYTES, 7),
    Buffer.alloc(PAGE_BYTES, 9),
    Buffer.alloc(PAGE_BYTES, 0),
    Buffer.alloc(PAGE_BYTES, 7),
    Buffer.alloc(PAGE_BYTES, 0),
  ]);
  const found: PageRange[] = [
    { firstPage: 2, pages: 3, kind: "data" },
    { firstPage: 14, pages: 2, kind: "data" },
  ];
  const kept: PageRange[] = [];
  const bytes = await keepDifferences(found, copied, base, kept);
  assert.deepEqual(kept, [
    { firstPage: 3, pages: 1, kind: "data" },
    { firstPage: 4, pages: 1, kind: "zero" },
  ]);
  assert.equal(bytes, dataBytes({ memoryBytes: base.length, ranges: kept }));
  assert.deepEqual(copied.subarray(0, bytes), Buffer.alloc(PAGE_BYTES, 9));
});
