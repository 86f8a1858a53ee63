import assert from "node:assert/strict";
import fc from "fast-check";
import { test } from "vitest";
import { HttpError } from "../errors.ts";
import { negotiateEncoding, parseContentEncoding } from "./encoding.ts";
import { parseMetadata } from "./metadata.ts";
import { parseRange } from "./range.ts";

test("a range lies within the file, or there is none", () => {
  const number = fc.option(fc.nat({ max: 2000 }), { nil: undefined });
  fc.assert(
    fc.property(number, number, fc.integer({ min: 1, max: 1000 }), (first, last, size) => {
      const range = parseRange(`bytes=${first ?? ""}-${last ?? ""}`, size);
      if (typeof range === "string") return;
      assert.ok(0 <= range.start && range.start <= range.end && range.end < size);
    }),
  );
});

test("what is no single byte range means the whole file", () => {
  for (const header of [undefined, "", "bytes=-", "bytes=0-1,3-4", "lines=1-2", "bytes=5-2", "bytes=a-b"]) {
    assert.equal(parseRange(header, 10), "whole");
  }
  assert.equal(parseRange("bytes=-0", 10), "unsatisfiable");
  assert.equal(parseRange("bytes=10-", 10), "unsatisfiable");
});

test("the answer's coding is the best that both sides have", () => {
  const cases: [string | undefined, string][] = [
    [undefined, "identity"],
    ["", "identity"],
    ["gzip", "gzip"],
    ["GZIP;q=0.5, identity;q=0.1", "gzip"],
    ["identity, gzip;q=0.5", "identity"],
    ["br, deflate", "identity"],
    ["gzip;q=0", "identity"],
    ["*", "identity"],
    ["*, identity;q=0", "gzip"],
  ];
  for (const [header, expected] of cases) assert.equal(negotiateEncoding(header), expected, header);
  assert.throws(() => negotiateEncoding("br, identity;q=0"), { status: 406 });
  assert.equal(parseContentEncoding("Gzip"), "gzip");
  assert.throws(() => parseContentEncoding("br"), { status: 400 });
});

test("metadata is printable, named and bounded", () => {
  assert.deepEqual(parseMetadata({ "x-metadata-a": "1", "x-other": "2" }), { a: "1" });
  for (const headers of [
    { "x-metadata-": "x" },
    { "x-metadata-a": "ä" },
    { "x-metadata-a": "x".repeat(4096) },
    { [`x-metadata-${"k".repeat(247)}`]: "x" },
  ]) {
    assert.throws(() => parseMetadata(headers), HttpError);
  }
});
