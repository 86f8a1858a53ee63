import assert from "node:assert/strict";
import * as fc from "fast-check";
import { test } from "vitest";
import type { CpioEntry } from "./cpio.ts";
import { writeCpio } from "./cpio.ts";

interface Record {
  inode: number;
  mode: number;
  device: string;
  path: string;
  data: Buffer;
}

/** Reads the format as the kernel does (init/initramfs.c). */
function readCpio(archive: Buffer): Record[] {
  const records: Record[] = [];
  let at = 0;
  for (;;) {
    assert.equal(archive.toString("latin1", at, at + 6), "070701");
    const field = (index: number): number =>
      Number.parseInt(archive.toString("latin1", at + 6 + index * 8, at + 14 + index * 8), 16);
    const nameLength = field(11);
    const nameAt = at + 110;
    assert.equal(archive[nameAt + nameLength - 1], 0);
    const path = archive.toString("utf8", nameAt, nameAt + nameLength - 1);
    const dataAt = (nameAt + nameLength + 3) & ~3;
    const data = archive.subarray(dataAt, dataAt + field(6));
    const record = { inode: field(0), mode: field(1), device: `${field(9)}:${field(10)}`, path, data };
    at = (dataAt + data.length + 3) & ~3;
    if (path === "TRAILER!!!") {
      assert.equal(at, archive.length);
      return records;
    }
    records.push(record);
  }
}

test("every kind of entry is read back as it was written", () => {
  const records = readCpio(
    writeCpio([
      { kind: "directory", path: "dev", mode: 0o755 },
      { kind: "character-device", path: "dev/console", mode: 0o600, major: 5, minor: 1 },
      { kind: "file", path: "init", mode: 0o755, data: Buffer.from("#!/bin/sh\n") },
      { kind: "symlink", path: "bin", target: "usr/bin" },
    ]),
  );
  assert.deepEqual(
    records.map(({ mode, device, path, data }) => [path, mode.toString(8), device, data.toString()]),
    [
      ["dev", "40755", "0:0", ""],
      ["dev/console", "20600", "5:1", ""],
      ["init", "100755", "0:0", "#!/bin/sh\n"],
      ["bin", "120777", "0:0", "usr/bin"],
    ],
  );
});

test("names and contents of any length come back whole, and no two entries are hard links", () => {
  const anyFile = fc.record({
    kind: fc.constant("file" as const),
    path: fc.stringMatching(/^[a-zé/]{1,40}$/),
    mode: fc.constant(0o644),
    data: fc.uint8Array({ maxLength: 70 }),
  });
  fc.assert(
    fc.property(fc.array(anyFile, { maxLength: 8 }), (files: CpioEntry[]) => {
      const records = readCpio(writeCpio(files));
      assert.deepEqual(
        records.map(({ path, data }) => [path, [...data]]),
        files.map((file) => (file.kind === "file" ? [file.path, [...file.data]] : [])),
      );
      assert.equal(new Set(records.map(({ inode }) => inode)).size, files.length);
    }),
  );
});

test("equal entries give equal bytes", () => {
  const entries: CpioEntry[] = [{ kind: "file", path: "a", mode: 0o644, data: Buffer.from("b") }];
  assert.deepEqual(writeCpio(entries), writeCpio(entries));
});
