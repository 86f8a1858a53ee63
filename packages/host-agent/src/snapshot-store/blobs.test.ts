import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import { existsSync } from "node:fs";
import { mkdtemp, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { RookeryError } from "@rookery/protocol/errors";
import { afterEach, beforeEach, test, vi } from "vitest";
import { DirectoryStore } from "../object-store/directory.ts";
import { changedStore, pieces, read } from "../object-store/object-store.contract.ts";
import type { ObjectStore } from "../object-store/object-store.ts";
import { Blobs, blobKey } from "./blobs.ts";
import { contentRefOf, type ContentRef } from "./sparse-stream.ts";

vi.setConfig({ testTimeout: 60_000 });
const { signal } = new AbortController();
const CONTENT = randomBytes(3 << 20); // does not compress
let dir: string;
let store: ObjectStore;
let source: string;
let ref: ContentRef;

beforeEach(async () => {
  dir = await mkdtemp(join(existsSync("/dev/shm") ? "/dev/shm" : tmpdir(), "rk-blobs-"));
  store = new DirectoryStore(join(dir, "store"));
  source = join(dir, "source");
  await writeFile(source, CONTENT);
  ref = await contentRefOf(source, signal);
});
afterEach(() => rm(dir, { recursive: true, force: true }));

async function openBlobs(changes: Partial<ObjectStore> = {}, idleMs = 30_000): Promise<Blobs> {
  const blobs = new Blobs({
    store: changedStore(store, changes),
    partsDir: join(dir, "parts"),
    nowMs: Date.now,
    sleep: async () => undefined,
    idleMs,
  });
  await blobs.open();
  return blobs;
}
const parts = (): Promise<string[]> => readdir(join(dir, "parts"));

/** A `get` whose body does what `spoil` says after `bytes`; counts from where it was asked. */
function spoiled(bytes: number, spoil: () => Promise<never>, times = Infinity) {
  const asked: number[] = [];
  const get: ObjectStore["get"] = async (key, options, aborted) => {
    const object = await store.get(key, options, aborted);
    asked.push(options.from);
    if (object === undefined || asked.length > times) return object;
    const body = async function* () {
      let left = bytes;
      for await (const piece of object.body) {
        yield piece.subarray(0, left);
        left -= piece.length;
        if (left <= 0) await Promise.race([spoil(), rejection(aborted)]);
      }
    };
    return { facts: object.facts, body: body() };
  };
  return { get, asked };
}
const rejection = (aborted: AbortSignal): Promise<never> =>
  new Promise((_, reject) => aborted.addEventListener("abort", () => reject(aborted.reason as Error)));
const cutOff = (): Promise<never> => Promise.reject(new Error("connection reset"));

test("what was sent is fetched, and is sent once", async () => {
  const blobs = await openBlobs();
  assert.equal(await blobs.send(source, ref, signal), "sent");
  assert.equal(await blobs.send(source, ref, signal), "there");
  let came = 0;
  await blobs.fetch(ref, join(dir, "got"), signal, (bytes) => (came += bytes));
  assert.ok((await readFile(join(dir, "got"))).equals(CONTENT));
  assert.equal(came, (await store.head(blobKey(ref.sha256), signal))!.bytes);
  assert.deepEqual(await parts(), []);
});

test("what is old is sent again, so that no sweep takes it from under a new snapshot", async () => {
  await (await openBlobs()).send(source, ref, signal);
  const before = (await store.head(blobKey(ref.sha256), signal))!;
  const old = { ...before, modifiedMs: Date.now() - 13 * 3_600_000 };
  const later = await openBlobs({ head: async () => old });
  assert.equal(await later.send(source, ref, signal), "sent");
  assert.notEqual((await store.head(blobKey(ref.sha256), signal))!.tag, before.tag);
});

test("a file that changed is not stored under its former name", async () => {
  const blobs = await openBlobs();
  await writeFile(source, Buffer.from("other"));
  await assert.rejects(blobs.send(source, ref, signal), /changed/);
  assert.equal(await store.head(blobKey(ref.sha256), signal), undefined);
});

test("a download that is cut goes on where it ended", async () => {
  await (await openBlobs()).send(source, ref, signal);
  const { get, asked } = spoiled(1 << 20, cutOff, 2);
  await (await openBlobs({ get })).fetch(ref, join(dir, "got"), signal);
  assert.ok((await readFile(join(dir, "got"))).equals(CONTENT));
  assert.deepEqual(asked, [0, 1 << 20, 2 << 20]);
});

test("a download goes on after the agent was started again", async () => {
  await (await openBlobs()).send(source, ref, signal);
  const abort = new AbortController();
  const { get } = spoiled(2 << 20, async () => {
    abort.abort(new RookeryError("unavailable", "the agent is stopping"));
    return await cutOff();
  });
  const first = await openBlobs({ get });
  await assert.rejects(first.fetch(ref, join(dir, "got"), abort.signal), { code: "unavailable" });
  assert.ok(!existsSync(join(dir, "got")));
  const again = spoiled(Infinity, cutOff);
  await (await openBlobs({ get: again.get })).fetch(ref, join(dir, "got"), signal);
  assert.deepEqual(again.asked, [2 << 20]);
  assert.ok((await readFile(join(dir, "got"))).equals(CONTENT));
});

test("a store that sends nothing is asked again", async () => {
  await (await openBlobs()).send(source, ref, signal);
  const { get, asked } = spoiled(1 << 20, () => new Promise<never>(() => undefined), 1);
  await (await openBlobs({ get }, 100)).fetch(ref, join(dir, "got"), signal);
  assert.equal(asked.length, 2);
});

test("a store that stays away is given up", async () => {
  await (await openBlobs()).send(source, ref, signal);
  const { get, asked } = spoiled(0, cutOff);
  const blobs = await openBlobs({ get });
  await assert.rejects(blobs.fetch(ref, join(dir, "got"), signal), { code: "unavailable" });
  assert.equal(asked.length, 5);
});

test("a torn part is not used: the download begins anew", async () => {
  await (await openBlobs()).send(source, ref, signal);
  const abort = new AbortController();
  const { get } = spoiled(1 << 20, async () => {
    abort.abort(new RookeryError("timeout", "too long"));
    return await cutOff();
  });
  const first = await openBlobs({ get });
  await assert.rejects(first.fetch(ref, join(dir, "got"), abort.signal), { code: "timeout" });
  const [name] = await parts();
  await writeFile(join(dir, "parts", name!), Buffer.alloc(1 << 20));
  await (await openBlobs()).fetch(ref, join(dir, "got"), signal);
  assert.ok((await readFile(join(dir, "got"))).equals(CONTENT));
});

test("what is damaged in the store is refused, and nothing of it stays", async () => {
  await (await openBlobs()).send(source, ref, signal);
  const stored = await read(await store.get(blobKey(ref.sha256), { from: 0 }, signal));
  const wrong = Buffer.from(stored);
  wrong[stored.length >> 1]! ^= 1;
  for (const bad of [
    wrong,
    stored.subarray(0, stored.length >> 1),
    Buffer.from("no zstd"),
    Buffer.alloc(0),
  ]) {
    await store.put(blobKey(ref.sha256), pieces(bad, 1 << 20), signal);
    const blobs = await openBlobs();
    await assert.rejects(blobs.fetch(ref, join(dir, "got"), signal), { code: "host_error" });
    assert.ok(!existsSync(join(dir, "got")) && !existsSync(join(dir, "got.unfinished")));
    assert.deepEqual(await parts(), []);
  }
});

test("an object that is replaced during a download is fetched from its beginning", async () => {
  await (await openBlobs()).send(source, ref, signal);
  const { get } = spoiled(
    1 << 20,
    async () => {
      const stored = await read(await store.get(blobKey(ref.sha256), { from: 0 }, signal));
      await store.put(blobKey(ref.sha256), pieces(stored, 1 << 20), signal);
      return await cutOff();
    },
    1,
  );
  await (await openBlobs({ get })).fetch(ref, join(dir, "got"), signal);
  assert.ok((await readFile(join(dir, "got"))).equals(CONTENT));
});

test("a part that the store lacks is said to be", async () => {
  const blobs = await openBlobs();
  await assert.rejects(blobs.fetch(ref, join(dir, "got"), signal), { code: "host_error", message: /lacks/ });
});

test("two that want one content at once both get it", async () => {
  const blobs = await openBlobs();
  await blobs.send(source, ref, signal);
  const paths = [join(dir, "one"), join(dir, "two")];
  await Promise.all(paths.map((path) => blobs.fetch(ref, path, signal)));
  for (const path of paths) assert.ok((await readFile(path)).equals(CONTENT));
});
