import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { existsSync } from "node:fs";
import { mkdtemp, open, readFile, rm, stat, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import fc from "fast-check";
import { afterAll, beforeAll, test, vi } from "vitest";
import { contentRefOf, Damaged, readSparse, writeSparse } from "./sparse-stream.ts";

vi.setConfig({ testTimeout: 60_000 });

let dir: string;
beforeAll(async () => {
  // In memory where that can be had: these tests sync a lot.
  dir = await mkdtemp(join(existsSync("/dev/shm") ? "/dev/shm" : tmpdir(), "rk-sparse-"));
});
afterAll(() => rm(dir, { recursive: true, force: true }));
const { signal } = new AbortController();
let names = 0;
const newPath = (): string => join(dir, `file-${(names += 1)}`);
const BLOCK = 64 << 10;

async function streamOf(path: string): Promise<Buffer> {
  const parts: Buffer[] = [];
  for await (const piece of readSparse(path, signal)) parts.push(piece);
  return Buffer.concat(parts);
}

async function* cut(stream: Buffer, bytes: number): AsyncGenerator<Buffer> {
  for (let at = 0; at < stream.length; at += bytes) yield stream.subarray(at, at + bytes);
}

test("a file comes back byte for byte, in whatever pieces its stream arrives", async () => {
  const block = fc.oneof(
    fc.constant(Buffer.alloc(BLOCK)),
    fc.integer({ min: 1, max: 255 }).map((fill) => Buffer.alloc(BLOCK, fill)),
    fc.integer({ min: 0, max: BLOCK - 1 }).map((at) => {
      const bytes = Buffer.alloc(BLOCK);
      bytes[at] = 1;
      return bytes;
    }),
  );
  await fc.assert(
    fc.asyncProperty(
      fc.array(block, { maxLength: 20 }),
      fc.nat({ max: BLOCK - 1 }),
      fc.integer({ min: 1, max: 200_000 }),
      async (blocks, missing, pieceBytes) => {
        const whole = Buffer.concat(blocks);
        const content = whole.subarray(0, Math.max(0, whole.length - missing));
        const [from, to] = [newPath(), newPath()];
        await writeFile(from, content);
        const ref = await contentRefOf(from, signal);
        const stream = await streamOf(from);
        assert.equal(ref.sha256, createHash("sha256").update(stream).digest("hex"));
        assert.equal(ref.bytes, content.length);
        await writeSparse(to, cut(stream, pieceBytes), ref, signal);
        assert.ok((await readFile(to)).equals(content));
        await Promise.all([rm(from), rm(to)]);
      },
    ),
    { numRuns: 40 },
  );
});

test("holes cost nothing, and do not change the name", async () => {
  const [sparse, dense, back] = [newPath(), newPath(), newPath()];
  const size = 64 << 20;
  {
    await using file = await open(sparse, "w");
    await file.truncate(size);
    await file.write(Buffer.from("here"), 0, 4, 40 << 20);
  }
  const content = Buffer.alloc(size);
  content.write("here", 40 << 20);
  await writeFile(dense, content);
  const ref = await contentRefOf(sparse, signal);
  assert.deepEqual(await contentRefOf(dense, signal), ref);
  assert.ok(ref.dataBytes < 2 * BLOCK);
  await writeSparse(back, cut(await streamOf(sparse), 9999), ref, signal);
  assert.ok((await readFile(back)).equals(content));
  assert.ok((await stat(back)).blocks * 512 < 1 << 20);
});

test("a stream with any bit changed, cut or prolonged is damaged", async () => {
  const path = newPath();
  await writeFile(path, Buffer.concat([Buffer.alloc(BLOCK, 1), Buffer.alloc(BLOCK), Buffer.alloc(100, 2)]));
  const ref = await contentRefOf(path, signal);
  const stream = await streamOf(path);
  const changed = (at: number): Buffer => {
    const copy = Buffer.from(stream);
    copy[at]! ^= 1;
    return copy;
  };
  const bad = [
    ...[0, 8, 12, 15, 16, 20, 23, 24, 26, 30, stream.length - 1, stream.length - 120].map(changed),
    ...[0, 7, 16, 17, 40, stream.length - 1].map((length) => stream.subarray(0, length)),
    Buffer.concat([stream, Buffer.from("x")]),
    Buffer.concat([stream, stream]),
  ];
  for (const [index, one] of bad.entries()) {
    await assert.rejects(writeSparse(newPath(), cut(one, 1000), ref, signal), Damaged, `case ${index}`);
  }
});

test("nothing of a stream is written beyond the size that was asked for", async () => {
  const path = newPath();
  await writeFile(path, Buffer.alloc(4 * BLOCK, 7));
  const ref = await contentRefOf(path, signal);
  const to = newPath();
  await assert.rejects(
    writeSparse(to, cut(await streamOf(path), 5000), { ...ref, bytes: BLOCK }, signal),
    Damaged,
  );
  assert.equal((await stat(to)).size, BLOCK);
});
