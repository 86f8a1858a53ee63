import { strict as assert } from "node:assert";
import * as fc from "fast-check";
import { test } from "vitest";
import { FrameReader, frameOf } from "./envelope.ts";

test("frames come out as they went in, however the stream is cut", () => {
  fc.assert(
    fc.property(
      fc.array(fc.uint8Array({ maxLength: 300 }), { maxLength: 20 }),
      fc.array(fc.integer({ min: 1, max: 97 }), { minLength: 1, maxLength: 10 }),
      (messages, cuts) => {
        const bytes = Buffer.concat(messages.map((message) => frameOf(message)));
        const reader = new FrameReader(1000);
        const seen: Uint8Array[] = [];
        for (let offset = 0, i = 0; offset < bytes.byteLength; i += 1) {
          const size = cuts[i % cuts.length]!;
          for (const frame of reader.push(bytes.subarray(offset, offset + size))) seen.push(frame.data);
          offset += size;
        }
        assert.deepEqual(
          seen.map((data) => Buffer.from(data)),
          messages.map((data) => Buffer.from(data)),
        );
      },
    ),
  );
});

test("a length past the bound, unknown flags, compression and words after the end are refused", () => {
  const refused = (bytes: number[]) =>
    assert.throws(() => [...new FrameReader(100).push(Buffer.from(bytes))], { code: "guest_error" });
  refused([0, 0xff, 0xff, 0xff, 0xff]);
  refused([0, 0, 0, 0, 101]);
  refused([4, 0, 0, 0, 0]);
  refused([1, 0, 0, 0, 0]);
  refused([2, 0, 0, 0, 0, 9]);
});

test("a frame that comes byte by byte is put together with bounded parts", () => {
  const message = Buffer.alloc(20_000, 7);
  const bytes = frameOf(message);
  const reader = new FrameReader(20_000);
  const seen: Buffer[] = [];
  for (const byte of bytes)
    for (const frame of reader.push(Buffer.from([byte]))) seen.push(Buffer.from(frame.data));
  assert.equal(seen.length, 1);
  assert(seen[0]!.equals(message));
});
