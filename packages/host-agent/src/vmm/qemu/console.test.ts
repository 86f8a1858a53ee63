import assert from "node:assert/strict";
import fc from "fast-check";
import { test } from "vitest";
import { consoleLines, consoleTail, saysPanic } from "./console.ts";

test("a panic's message is shown, not the trace that follows it", () => {
  const trace = Array.from({ length: 40 }, (_, at) => `[    9.1${at}]  some_function+0x${at}`);
  const raw = [
    "booting",
    "\u001b[31mBUG: oops\u001b[0m",
    "[ 9.0] Kernel panic - not syncing: Fatal exception",
    ...trace,
  ];
  const lines = consoleLines(Buffer.from(raw.join("\r\n")));
  assert.ok(saysPanic(lines));
  assert.match(consoleTail(lines), /^BUG: oops\n\[ 9.0\] Kernel panic/);
});

test("without a panic the last lines are shown", () => {
  const lines = consoleLines(Buffer.from(Array.from({ length: 30 }, (_, at) => `line ${at}`).join("\n")));
  assert.equal(saysPanic(lines), false);
  assert.equal(consoleTail(lines).split("\n").at(-1), "line 29");
});

test("whatever a guest writes, what is shown is short and printable", () => {
  fc.assert(
    fc.property(fc.uint8Array({ maxLength: 20_000 }), (bytes) => {
      const tail = consoleTail(consoleLines(Buffer.from(bytes)));
      assert.match(tail, /^[\u0020-\u007e\n]*$/);
      assert.ok(tail.length <= 12 * 201);
    }),
  );
});
