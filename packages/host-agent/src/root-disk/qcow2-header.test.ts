import { strict as assert } from "node:assert";
import * as fc from "fast-check";
import { test } from "vitest";
import { parseQcow2Header } from "./qcow2-header.ts";

function header(backingFile: string): Buffer {
  const bytes = Buffer.alloc(600);
  bytes.writeUInt32BE(0x514649fb, 0);
  bytes.writeUInt32BE(3, 4);
  bytes.writeBigUInt64BE(528n, 8);
  bytes.writeUInt32BE(backingFile.length, 16);
  bytes.writeBigUInt64BE(4096n << 20n, 24);
  bytes.write(backingFile, 528);
  return bytes;
}

test("a plain overlay's header gives its size and its backing file", () => {
  assert.deepEqual(parseQcow2Header(header("below-0")), {
    sizeBytes: 4096 * 2 ** 20,
    backingFile: "below-0",
  });
});

test("every feature that changes how a file is read is refused", () => {
  fc.assert(
    fc.property(fc.integer({ min: 2, max: 63 }), (bit) => {
      const bytes = header("below-0");
      bytes.writeBigUInt64BE(1n << BigInt(bit), 72);
      assert.throws(() => parseQcow2Header(bytes), /incompatible features/);
    }),
  );
});

test("encryption, internal snapshots, old versions and names out of reach are refused", () => {
  const changed = (offset: number, value: number): Buffer => {
    const bytes = header("below-0");
    bytes.writeUInt32BE(value, offset);
    return bytes;
  };
  assert.throws(() => parseQcow2Header(changed(32, 2)), /encrypted/);
  assert.throws(() => parseQcow2Header(changed(60, 1)), /snapshots/);
  assert.throws(() => parseQcow2Header(changed(4, 2)), /version 2/);
  assert.throws(() => parseQcow2Header(changed(16, 0xffff_ffff)), /name of its backing file/);
  assert.throws(() => parseQcow2Header(changed(8, 1)), /name of its backing file/);
  assert.throws(() => parseQcow2Header(changed(24, 0xffff_ffff)), /claims to hold/);
});

test("arbitrary bytes are an answer or an Error of ours, never another", () => {
  fc.assert(
    fc.property(fc.uint8Array({ maxLength: 700 }), fc.boolean(), (noise, isPlausible) => {
      const bytes = Buffer.from(noise);
      if (isPlausible) header("x").copy(bytes, 0, 0, Math.min(8, bytes.length));
      try {
        parseQcow2Header(bytes);
      } catch (error) {
        assert.equal((error as Error).constructor, Error);
      }
    }),
  );
});
