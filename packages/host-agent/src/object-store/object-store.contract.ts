/** What every object store must do. A driver's own test calls this with an empty store of each name. */
import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import { RookeryError } from "@rookery/protocol/errors";
import { describe, test } from "vitest";
import type { ObjectStore, StoredObject } from "./object-store.ts";

/** More than one part of an upload, and not a whole number of them. */
const LARGE_BYTES = (11 << 20) + 4711;

export function objectStoreContract(
  name: string,
  openStore: (name: string) => Promise<ObjectStore> | ObjectStore,
): void {
  describe(`${name} keeps the object store contract`, () => {
    const { signal } = new AbortController();
    let made = 0;
    const fresh = async (): Promise<ObjectStore> => await openStore(`store-${(made += 1)}`);

    test("an object is read back as it was put, from any byte on", async () => {
      const store = await fresh();
      const content = Buffer.from("some bytes that matter");
      await store.put("blobs/one", pieces(content, 5), signal);
      assert.equal((await store.head("blobs/one", signal))?.bytes, content.length);
      assert.deepEqual(await read(await store.get("blobs/one", { from: 0 }, signal)), content);
      const rest = await store.get("blobs/one", { from: 7 }, signal);
      assert.equal(rest?.facts.bytes, content.length, "the size of the whole object");
      assert.deepEqual(await read(rest), content.subarray(7));
    });

    test("an object of many parts is read back as it was put", { timeout: 120_000 }, async () => {
      const store = await fresh();
      const content = randomBytes(LARGE_BYTES);
      await store.put("blobs/large", pieces(content, 700_001), signal);
      assert.equal((await store.head("blobs/large", signal))?.bytes, LARGE_BYTES);
      const back = await read(await store.get("blobs/large", { from: 0 }, signal));
      assert.ok(back.equals(content));
      const tail = await read(await store.get("blobs/large", { from: LARGE_BYTES - 3 }, signal));
      assert.deepEqual(tail, content.subarray(-3));
    });

    test("an empty object is an object", async () => {
      const store = await fresh();
      await store.put("empty", pieces(Buffer.alloc(0), 1), signal);
      assert.equal((await store.head("empty", signal))?.bytes, 0);
      assert.equal((await read(await store.get("empty", { from: 0 }, signal))).length, 0);
    });

    test("what is not there is undefined, and deleting it succeeds", async () => {
      const store = await fresh();
      assert.equal(await store.head("nothing", signal), undefined);
      assert.equal(await store.get("nothing", { from: 0 }, signal), undefined);
      await store.delete("nothing", signal);
      await store.put("thing", pieces(Buffer.from("x"), 1), signal);
      await store.delete("thing", signal);
      await store.delete("thing", signal);
      assert.equal(await store.head("thing", signal), undefined);
    });

    test("a replaced object has another tag, the same object the same", async () => {
      const store = await fresh();
      await store.put("thing", pieces(Buffer.from("one"), 3), signal);
      const before = await store.head("thing", signal);
      assert.equal((await store.get("thing", { from: 1 }, signal))?.facts.tag, before?.tag);
      await store.put("thing", pieces(Buffer.from("two"), 3), signal);
      assert.notEqual((await store.head("thing", signal))?.tag, before?.tag);
      assert.equal((await read(await store.get("thing", { from: 0 }, signal))).toString(), "two");
    });

    test(
      "content that fails half-way leaves what was there, and no trace",
      { timeout: 120_000 },
      async () => {
        const store = await fresh();
        await store.put("thing", pieces(Buffer.from("whole"), 5), signal);
        const cut = async function* () {
          yield randomBytes(LARGE_BYTES);
          throw new RookeryError("host_error", "the source ended");
        };
        await assert.rejects(store.put("thing", cut(), signal), { code: "host_error" });
        await assert.rejects(store.put("other", cut(), signal), { code: "host_error" });
        assert.equal((await read(await store.get("thing", { from: 0 }, signal))).toString(), "whole");
        assert.deepEqual(await keys(store, ""), ["thing"]);
      },
    );

    test("an aborted put leaves nothing", async () => {
      const store = await fresh();
      const abort = new AbortController();
      const endless = async function* () {
        for (let n = 0; ; n += 1) {
          if (n === 3) abort.abort(new RookeryError("timeout", "enough"));
          yield Buffer.alloc(1 << 20);
        }
      };
      await assert.rejects(store.put("thing", endless(), abort.signal), { code: "timeout" });
      assert.deepEqual(await keys(store, ""), []);
    });

    test("a list has what begins with its prefix, with size and time", async () => {
      const store = await fresh();
      for (const key of ["a/1", "a/2", "ab/3", "b/a/4"]) {
        await store.put(key, pieces(Buffer.from(key), 9), signal);
      }
      assert.deepEqual(await keys(store, "a/"), ["a/1", "a/2"]);
      assert.deepEqual(await keys(store, ""), ["a/1", "a/2", "ab/3", "b/a/4"]);
      for await (const { bytes, modifiedMs } of store.list("a/", signal)) {
        assert.equal(bytes, 3);
        assert.ok(Math.abs(modifiedMs - Date.now()) < 3_600_000);
      }
    });

    test("its identity stays, and is another store's never", async () => {
      const [store, other] = [await fresh(), await fresh()];
      const [one, again] = await Promise.all([store.identity(signal), store.identity(signal)]);
      assert.match(one, /^[0-9a-f]{64}$/);
      assert.equal(again, one);
      assert.notEqual(await other.identity(signal), one);
    });

    test("a key cannot lead out of the store", async () => {
      const store = await fresh();
      for (const key of [
        "../x",
        "a/../../x",
        "/etc/passwd",
        "",
        "a//b",
        ".hidden",
        "a\0b",
        "x".repeat(201),
      ]) {
        await assert.rejects(store.put(key, pieces(Buffer.from("x"), 1), signal), /not a key/, key);
        await assert.rejects(store.get(key, { from: 0 }, signal), /not a key/, key);
      }
    });
  });
}

/** `store`, but for what `changes` does instead. */
export function changedStore(store: ObjectStore, changes: Partial<ObjectStore>): ObjectStore {
  return {
    kind: store.kind,
    identity: (signal) => store.identity(signal),
    head: (key, signal) => store.head(key, signal),
    put: (key, content, signal) => store.put(key, content, signal),
    get: (key, options, signal) => store.get(key, options, signal),
    list: (prefix, signal) => store.list(prefix, signal),
    delete: (key, signal) => store.delete(key, signal),
    close: () => store.close(),
    ...changes,
  };
}

export async function* pieces(content: Buffer, bytes: number): AsyncGenerator<Buffer> {
  for (let at = 0; at < content.length; at += bytes) yield content.subarray(at, at + bytes);
}

export async function read(object: StoredObject | undefined): Promise<Buffer> {
  assert.ok(object, "there is no such object");
  const parts: Uint8Array[] = [];
  for await (const piece of object.body) parts.push(piece);
  return Buffer.concat(parts);
}

async function keys(store: ObjectStore, prefix: string): Promise<string[]> {
  const found: string[] = [];
  for await (const { key } of store.list(prefix, new AbortController().signal)) found.push(key);
  return found.sort();
}
