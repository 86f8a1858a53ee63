import assert from "node:assert/strict";
import { test } from "vitest";
import { composeStream, deviceSections, memoryPrefixBytes } from "./device-state.ts";

const HEADER = Buffer.from("QEVM\0\0\0\x03", "latin1");
/** A full section "timer": type, id 3, name, instance 0, version 2, one byte of state, footer. */
const SECTION = Buffer.from("\x04\0\0\0\x03\x05timer\0\0\0\0\0\0\0\x02S\x7e\0\0\0\x03\0", "latin1");
const SAVED = Buffer.concat([HEADER, SECTION]);
/** A configuration section and a memory section with its footer. */
const MEMORY = Buffer.concat([
  HEADER,
  Buffer.from("\x07conf\x01\0\0\0\x02\x03ram....\x7e\0\0\0\x02", "latin1"),
]);
const STREAM = Buffer.concat([MEMORY, SECTION, Buffer.from("\x06\0\0\0\x02{}", "latin1")]);

test("a saved device state behind the base's memory sections is a whole stream", () => {
  const sections = deviceSections(SAVED);
  const prefix = STREAM.subarray(0, memoryPrefixBytes(STREAM, sections));
  assert.deepEqual(prefix, MEMORY);
  const composed = composeStream(prefix, sections);
  assert.deepEqual(composed, Buffer.concat([MEMORY, SECTION, Buffer.from("\x06\0\0\0\0", "latin1")]));
});

test("what is no stream of QEMU, or of another version, is refused", () => {
  assert.throws(() => deviceSections(Buffer.alloc(0)));
  assert.throws(() => deviceSections(HEADER));
  assert.throws(() => deviceSections(Buffer.concat([Buffer.from("QEVM\0\0\0\x02", "latin1"), SECTION])));
  assert.throws(
    () => deviceSections(Buffer.concat([HEADER, Buffer.from("\x01rest", "latin1")])),
    /full section/,
  );
  assert.throws(() => deviceSections(SAVED.subarray(0, 16)), /full section/);
});

test("a base whose first device section is not found once, after its memory, is refused", () => {
  const sections = deviceSections(SAVED);
  assert.throws(() => memoryPrefixBytes(MEMORY, sections), /no device section/);
  assert.throws(
    () => memoryPrefixBytes(Buffer.concat([HEADER, Buffer.alloc(9), SECTION]), sections),
    /no device section/,
  );
  assert.throws(() => memoryPrefixBytes(Buffer.concat([STREAM, SECTION]), sections), /not unique/);
});
