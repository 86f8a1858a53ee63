import assert from "node:assert/strict";
import fc from "fast-check";
import { test } from "vitest";
import { FrameReader, frameOf } from "./frames.ts";

test("messages come out as they went in, however the network cuts them", () => {
  const messages = fc.array(fc.uint8Array({ maxLength: 50 }), { maxLength: 8 });
  fc.assert(
    fc.property(messages, fc.array(fc.integer({ min: 1, max: 40 })), (sent, cuts) => {
      const bytes = Buffer.concat(sent.map((message) => frameOf(0, message)));
      const reader = new FrameReader(50);
      const received: Buffer[] = [];
      let offset = 0;
      for (const cut of [...cuts, bytes.byteLength]) {
        received.push(...reader.push(bytes.subarray(offset, offset + cut)));
        offset = Math.min(offset + cut, bytes.byteLength);
      }
      reader.finish();
      assert.deepEqual(
        received.map((message) => [...message]),
        sent.map((message) => [...message]),
      );
    }),
  );
});

test("what breaks the rules is refused", () => {
  const push = (frame: Buffer) => [...new FrameReader(10).push(frame)];
  assert.throws(() => push(frameOf(1, Buffer.from("x"))), /compressed/);
  assert.throws(() => push(frameOf(2, Buffer.from("x"))), /unknown flags/);
  assert.throws(() => push(frameOf(0, Buffer.alloc(11))), /exceeds/);
  const reader = new FrameReader(10);
  assert.deepEqual([...reader.push(frameOf(0, Buffer.from("abc")).subarray(0, 6))], []);
  assert.throws(() => reader.finish(), /ends within/);
});
