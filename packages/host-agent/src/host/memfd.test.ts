import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { closeSync, ftruncateSync, openSync, writeSync } from "node:fs";
import { connect } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "vitest";
import {
  addressOf,
  isSealedAgainstChange,
  listenUnix,
  mapFileForReading,
  mapFileForWriting,
  readProcessMemory,
  writeProcessMemory,
} from "./ffi.ts";
import { Memfd } from "./memfd.ts";

const signal = new AbortController().signal;

test("a sealed memfd can be read and mapped, and changed by nobody", () => {
  using memfd = Memfd.create("rookery-test");
  ftruncateSync(memfd.fd, 8192);
  const writable = mapFileForWriting(memfd.fd, 8192);
  writable.bytes.write("hello", 4096);
  writable.unmap();
  assert.equal(isSealedAgainstChange(memfd.fd), false);
  memfd.seal();
  assert.equal(isSealedAgainstChange(memfd.fd), true);

  const mapping = mapFileForReading(memfd.fd, 8192);
  assert.equal(mapping.bytes.toString("utf8", 4096, 4101), "hello");
  mapping.unmap();
  // As a VMM does: by name, for writing.
  const again = openSync(`/proc/self/fd/${memfd.fd}`, "r+");
  try {
    assert.throws(() => writeSync(again, "x", 0), { code: "EPERM" });
    assert.throws(() => ftruncateSync(again, 0), { code: "EPERM" });
    assert.throws(() => mapFileForWriting(again, 8192), { code: "EPERM" });
  } finally {
    closeSync(again);
  }
});

test("a memfd is found again in a process that holds it, by its identity alone", async () => {
  const memfd = Memfd.create("rookery-test");
  memfd.write(Buffer.from("still here"), 0);
  const child = spawn("sleep", ["60"], { stdio: ["ignore", "ignore", "ignore", memfd.fd] });
  try {
    await once(child, "spawn");
    const { identity } = memfd;
    memfd[Symbol.dispose]();
    assert.ok(child.pid);
    using found = await Memfd.openFromProcess(child.pid, identity);
    assert.equal(found?.read(100).toString(), "still here");
    assert.throws(() => found?.read(3), RangeError);
    assert.equal(await Memfd.openFromProcess(child.pid, { ...identity, ino: "1" }), undefined);
  } finally {
    child.kill("SIGKILL");
    await once(child, "exit");
  }
  assert.equal(await Memfd.openFromProcess(child.pid ?? 0, { dev: "1", ino: "1" }), undefined);
});

test("another process's memory is read and written piece by piece", async () => {
  // Our own process serves as the other.
  const memory = Buffer.allocUnsafeSlow(3000 * 16);
  for (let at = 0; at < 3000; at += 1) memory.writeUInt32LE(at, at * 16);
  const base = Number(addressOf(memory));
  const ranges = Array.from({ length: 3000 }, (_, at) => ({ address: base + at * 16, bytes: 4 }));
  const copy = Buffer.allocUnsafeSlow(3000 * 4);
  await readProcessMemory(process.pid, ranges, copy, signal);
  assert.equal(copy.readUInt32LE(2999 * 4), 2999);
  copy.fill(0xff);
  await writeProcessMemory(process.pid, ranges, copy, signal);
  assert.equal(memory.readUInt32LE(1234 * 16), 0xffff_ffff);
  await assert.rejects(readProcessMemory(process.pid, ranges, copy.subarray(4), signal), RangeError);
  const unmapped = [{ address: 4096, bytes: 4096 }];
  await assert.rejects(readProcessMemory(process.pid, unmapped, memory, signal), { code: "EFAULT" });
  await assert.rejects(readProcessMemory(process.pid, ranges, copy, AbortSignal.abort()));
});

test("a socket that a child would inherit listens at its path, until its descriptor is closed", async () => {
  const path = join(tmpdir(), `rk-listen-${process.pid}.sock`);
  const fd = listenUnix(path);
  try {
    assert.throws(() => listenUnix(path), { code: "EADDRINUSE" });
    assert.throws(() => listenUnix(`/${"x".repeat(120)}`), RangeError);
    const socket = connect(path);
    await once(socket, "connect");
    socket.destroy();
  } finally {
    closeSync(fd);
  }
  const refused = connect(path);
  const [error] = (await once(refused, "error")) as [NodeJS.ErrnoException];
  assert.equal(error.code, "ECONNREFUSED");
});
