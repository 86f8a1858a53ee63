/** The agent's core on simulated hosts that share an object store. */
import assert from "node:assert/strict";
import { rmSync } from "node:fs";
import { RookeryError } from "@rookery/protocol/errors";
import { afterEach, beforeEach, expect, test, vi } from "vitest";
import { changedStore, pieces, read } from "../object-store/object-store.contract.ts";
import type { ObjectStore } from "../object-store/object-store.ts";
import { systemClock } from "../sandbox-manager/clock.ts";
import type { Stage } from "../sandbox-manager/testing/scenarios.ts";
import {
  newRoot,
  operationOf,
  sandboxId,
  snapshotId,
  specOf,
} from "../sandbox-manager/testing/simulated-machine.ts";
import { snapshotKey, storedSnapshotSchema } from "./stored-snapshot.ts";
import { SharingHosts } from "./testing/sharing-hosts.ts";

vi.setConfig({ testTimeout: 120_000 });
const { signal } = new AbortController();
const SOURCE = sandboxId("source");
const CHILD = sandboxId("child");
const SNAP = snapshotId("snap");
const MANIFEST = snapshotKey(SNAP);
let root: string;
let hosts: SharingHosts;

beforeEach(() => {
  root = newRoot();
  hosts = new SharingHosts(root);
});
afterEach(() => rmSync(root, { recursive: true, force: true }));

/** A sandbox with something in its memory, and a snapshot of it. */
async function makeSnapshot(stage: Stage, id = SNAP, source = SOURCE): Promise<void> {
  const { core, manager, machine } = stage;
  if (!core.sandboxes.has(source)) {
    await manager.create(specOf(source), operationOf(source, 1));
    const process = machine.processes.get(core.sandboxes.get(source)!.placed!.vm.record.pid)!;
    const memory = { ...process.guest.memory, counter: "7" };
    machine.processes.set({ ...process, guest: { ...process.guest, memory } });
  }
  await manager.createSnapshot(operationOf(source, 2), id, "team-1");
}

const isStored = ({ core }: Stage, id = SNAP): boolean => core.snapshots.get(id)?.storeId !== undefined;
const stored = (stage: Stage, id = SNAP): Promise<void> =>
  vi.waitFor(() => assert.ok(isStored(stage, id)), { timeout: 60_000 });

async function startFrom(stage: Stage, id = SNAP, child = CHILD, generation = 1): Promise<void> {
  const source = { kind: "snapshot" as const, snapshotId: id };
  await stage.manager.create(specOf(child, { source }), operationOf(child, generation));
  const process = stage.machine.processes.get(stage.core.sandboxes.get(child)!.placed!.vm.record.pid)!;
  // `corrupt`: its memory and its disk did not fit.
  expect(process).toMatchObject({ state: "running", corrupt: false });
  expect(process.guest.memory).toMatchObject({ counter: "7" });
}

/** What a host that fetched nothing, or all of it in vain, has of snapshots. */
function expectNothingFetched(host: string): void {
  expect(hosts.names(host, "snapshots")).toEqual([]);
  expect(hosts.names(host, "layers")).toEqual([]);
}

async function keysOf(prefix: string): Promise<string[]> {
  const keys: string[] = [];
  for await (const { key } of hosts.store.list(prefix)) keys.push(key);
  return keys.sort();
}

/** Calls `before` and `after` around each call that reads or changes the store. */
function watched(around: (call: string, when: "before" | "after") => Promise<void> | void) {
  return (store: ObjectStore): ObjectStore => {
    const wrap =
      <A extends unknown[], R>(name: string, call: (...all: A) => Promise<R>) =>
      async (...all: A): Promise<R> => {
        await around(`${name} ${String(all[0])}`, "before");
        const result = await call(...all);
        await around(`${name} ${String(all[0])}`, "after");
        return result;
      };
    return changedStore(store, {
      head: wrap("head", (...all: Parameters<ObjectStore["head"]>) => store.head(...all)),
      put: wrap("put", (...all: Parameters<ObjectStore["put"]>) => store.put(...all)),
      get: wrap("get", (...all: Parameters<ObjectStore["get"]>) => store.get(...all)),
      delete: wrap("delete", (...all: Parameters<ObjectStore["delete"]>) => store.delete(...all)),
    });
  };
}

test("a snapshot made on one host starts sandboxes on another, with its memory and its disk", async () => {
  const [a, b] = [await hosts.open("a"), await hosts.open("b")];
  await makeSnapshot(a);
  await stored(a);
  await startFrom(b);
  await startFrom(b, SNAP, sandboxId("second"));
  assert.deepEqual(await b.manager.destroyAll(), []);
  // And once more from what is cached, after the agent was started again.
  await b.manager.close();
  const again = await hosts.open("b", {
    through: watched(() => {
      throw new Error("the store is not needed");
    }),
  });
  await startFrom(again, SNAP, CHILD, 9);
});

test("a snapshot of a sandbox that came from elsewhere travels on, and sends only what is new", async () => {
  const a = await hosts.open("a");
  await makeSnapshot(a);
  await stored(a);
  const puts: string[] = [];
  const b = await hosts.open("b", {
    through: watched((call, when) => {
      if (when === "before" && call.startsWith("put")) puts.push(call);
    }),
  });
  await startFrom(b);
  const next = snapshotId("next");
  await makeSnapshot(b, next, CHILD);
  await stored(b, next);
  // Its disk's layer, its memory's two files, its manifest: no image, no base, no layer of its parent.
  expect(puts.length).toBe(4);
  const c = await hosts.open("c");
  await startFrom(c, next);
  const chain = c.core.snapshots.get(next)!.chain;
  expect(chain.length).toBe(4);
});

test("what is asked for at the same time is fetched once", async () => {
  const a = await hosts.open("a");
  await makeSnapshot(a);
  await stored(a);
  const gets: string[] = [];
  const b = await hosts.open("b", {
    through: watched((call, when) => {
      if (when === "before" && call.startsWith("get")) gets.push(call);
    }),
  });
  await Promise.all(["one", "two", "three"].map((name) => startFrom(b, SNAP, sandboxId(name))));
  expect(gets.length).toBe(new Set(gets).size);
});

test("a host with another CPU refuses before it fetches anything", async () => {
  const a = await hosts.open("a");
  await makeSnapshot(a);
  await stored(a);
  const gets: string[] = [];
  const b = await hosts.open("b", {
    fingerprint: "another",
    through: watched((call) => void (call.startsWith("get") && gets.push(call))),
  });
  await assert.rejects(startFrom(b), { code: "no_capacity", message: /CPU/ });
  expect(new Set(gets)).toEqual(new Set([`get ${MANIFEST}`]));
  expectNothingFetched("b");
});

test("a snapshot of another team, or of nobody, is not found", async () => {
  const [a, b] = [await hosts.open("a"), await hosts.open("b")];
  await makeSnapshot(a);
  await stored(a);
  const source = { kind: "snapshot" as const, snapshotId: SNAP };
  const theirs = b.manager.create(specOf(CHILD, { source, teamId: "team-2" }), operationOf(CHILD, 1));
  await assert.rejects(theirs, { code: "template_not_found" });
  await assert.rejects(startFrom(b, snapshotId("nobody"), sandboxId("other")), {
    code: "template_not_found",
  });
});

test("an agent that dies at any call of an upload goes on with it when it is started again", async () => {
  let calls = 0;
  let reached = 0;
  for (let at = 1; reached >= at - 1; at += 1) {
    calls = 0;
    const name = `a${at}`;
    const died = Promise.withResolvers<void>();
    const a = await hosts.open(name, {
      through: watched(async () => {
        calls += 1;
        if (calls < at) return;
        died.resolve();
        await new Promise(() => undefined); // as a SIGKILL is to whoever comes next
      }),
    });
    const snap = snapshotId(`snap${at}`);
    await makeSnapshot(a, snap);
    await Promise.race([died.promise, stored(a, snap)]);
    reached = calls;
    if (isStored(a, snap)) break;
    const again = await hosts.open(name);
    await stored(again, snap);
    await startFrom(await hosts.open(`b${at}`), snap);
  }
  expect(reached).toBeGreaterThan(10);
});

test("a host that fails at any call of a fetch is as it was, and gets it the next time", async () => {
  const a = await hosts.open("a");
  await makeSnapshot(a);
  await stored(a);
  let failed = true;
  for (let at = 1; failed; at += 1) {
    let calls = 0;
    failed = false;
    const name = `b${at}`;
    const b = await hosts.open(name, {
      through: watched(() => {
        calls += 1;
        if (calls !== at) return;
        failed = true;
        throw new RookeryError("host_error", "injected");
      }),
    });
    if (failed) continue;
    const outcome = await startFrom(b).then(
      () => "made",
      (cause: RookeryError) => cause.code,
    );
    if (!failed) {
      expect(outcome).toBe("made");
      expect(at).toBeGreaterThan(10);
      break;
    }
    expect(outcome).toBe("host_error");
    expectNothingFetched(name);
    await startFrom(b, SNAP, sandboxId("again"));
  }
});

test("an agent that dies at any call of a fetch leaves nothing that the next one does not know", async () => {
  const a = await hosts.open("a");
  await makeSnapshot(a);
  await stored(a);
  let hasDied = true;
  for (let at = 1; hasDied; at += 1) {
    let calls = 0;
    const died = Promise.withResolvers<void>();
    hasDied = false;
    const name = `b${at}`;
    const b = await hosts.open(name, {
      through: watched(async () => {
        calls += 1;
        // The dead call nobody any more, also where several run side by side.
        if (calls < at) return;
        hasDied = true;
        died.resolve();
        await new Promise(() => undefined);
      }),
    });
    await Promise.race([died.promise, startFrom(b)]);
    if (!hasDied) break;
    const again = await hosts.open(name);
    expectNothingFetched(name);
    await startFrom(again, SNAP, sandboxId("again"));
  }
});

test("a deletion takes it from here and from the store, also in the middle of its upload", async () => {
  const held = Promise.withResolvers<void>();
  const reached = Promise.withResolvers<void>();
  const a = await hosts.open("a", {
    through: watched(async (call, when) => {
      if (call !== `put ${MANIFEST}` || when !== "before") return;
      reached.resolve();
      await held.promise;
    }),
  });
  await makeSnapshot(a);
  await reached.promise;
  const deletion = a.manager.deleteSnapshot(SNAP);
  held.resolve();
  await deletion;
  expect(await keysOf("snapshots/")).toEqual([]);
  expect(hosts.names("a", "snapshots")).toEqual([]);
  await a.manager.close();
  const again = await hosts.open("a");
  expect(again.core.snapshots.size).toBe(0);
});

test("a deletion on a host that fetches it ends the fetch; where nothing is it takes it from the store", async () => {
  const a = await hosts.open("a");
  await makeSnapshot(a);
  await stored(a);
  const reached = Promise.withResolvers<void>();
  const b = await hosts.open("b", {
    through: watched(async (call, when) => {
      if (!call.startsWith("get blobs/") || when !== "after") return;
      reached.resolve();
      await new Promise((resolve) => setImmediate(resolve));
    }),
  });
  const child = assert.rejects(startFrom(b), { code: "template_not_found" });
  await reached.promise;
  await b.manager.deleteSnapshot(SNAP);
  await child;
  expectNothingFetched("b");
  expect(await keysOf("snapshots/")).toEqual([]);
  await assert.rejects(startFrom(await hosts.open("c")), { code: "template_not_found" });
  await b.manager.deleteSnapshot(SNAP);
});

test("a store that is away keeps nobody from making snapshots, and gets them when it is back", async () => {
  let away = true;
  const failures: string[] = [];
  const a = await hosts.open("a", {
    logger: { info() {}, debug() {}, error() {}, warn: (_facts, message) => failures.push(message) },
    through: watched(() => {
      if (away) throw new RookeryError("unavailable", "the store is away");
    }),
  });
  await makeSnapshot(a);
  await vi.waitFor(() => assert.ok(failures.some((words) => words.includes("sent"))));
  expect(isStored(a)).toBe(false);
  await startFrom(a); // on its own host all the same
  away = false;
  await stored(a);
});

test("copies go by budget, the longest unused first, and come back when they are wanted", async () => {
  const a = await hosts.open("a");
  const snaps = ["one", "two", "three"].map(snapshotId);
  for (const id of snaps) {
    await makeSnapshot(a, id);
    await stored(a, id);
  }
  const b = await hosts.open("b", { config: { snapshotCacheBytes: 1 } });
  await startFrom(b, snaps[0], sandboxId("one"));
  await startFrom(b, snaps[1], sandboxId("two"));
  await startFrom(b, snaps[2], sandboxId("three"));
  expect(hosts.names("b", "snapshots")).toEqual([snaps[2]]);
  await startFrom(b, snaps[0], sandboxId("four"));
  expect(hosts.names("b", "snapshots")).toEqual([snaps[0]]);
  assert.deepEqual(await b.manager.destroyAll(), []);
  // What it made itself is no copy.
  expect(hosts.names("a", "snapshots")).toEqual(snaps.toSorted());
});

test("a host whose disk has no place for it makes room, or says so", async () => {
  const a = await hosts.open("a");
  const other = snapshotId("other");
  await makeSnapshot(a);
  await makeSnapshot(a, other);
  await stored(a);
  await stored(a, other);
  let freeBytes = 2 ** 40;
  const b = await hosts.open("b", { freeDiskBytes: () => freeBytes });
  await startFrom(b);
  freeBytes = b.machine.deps.config.diskReserveBytes;
  await assert.rejects(startFrom(b, other, sandboxId("second")), { code: "out_of_disk" });
  // The copy that nobody was using went for it.
  expectNothingFetched("b-none");
  expect(hosts.names("b", "snapshots")).toEqual([]);
  freeBytes = 2 ** 40;
  await startFrom(b, other, sandboxId("third"));
});

test("what no snapshot needs any more goes from the store after a day, and not before", async () => {
  let lateMs = 0;
  const clock = { ...systemClock, nowMs: () => Date.now() + lateMs };
  hosts = new SharingHosts(root, clock);
  const a = await hosts.open("a");
  const kept = snapshotId("kept");
  await makeSnapshot(a);
  const running = a.machine.processes.get(a.core.sandboxes.get(SOURCE)!.placed!.vm.record.pid)!;
  a.machine.processes.set({ ...running, guest: { ...running.guest, memory: { since: "then" } } });
  await makeSnapshot(a, kept);
  await stored(a);
  await stored(a, kept);
  const before = await keysOf("blobs/");
  await a.manager.deleteSnapshot(SNAP);
  const { snapshotStore } = a.machine.deps;
  await snapshotStore!.sweep(signal);
  expect(await keysOf("blobs/")).toEqual(before);
  lateMs = 25 * 3_600_000;
  await snapshotStore!.sweep(signal);
  const after = await keysOf("blobs/");
  expect(after.length).toBeLessThan(before.length);
  const manifest = (await read(await hosts.store.get(snapshotKey(kept), { from: 0 }, signal))).toString();
  for (const key of after) expect(manifest).toContain(key.slice(6, 70));
});

test("a manifest that cannot be read ends a sweep: what it needs is not known", async () => {
  const a = await hosts.open("a");
  await makeSnapshot(a);
  await stored(a);
  await hosts.store.put(snapshotKey("snap-strange"), pieces(Buffer.from("{}"), 9), signal);
  const old = watched(() => undefined)(hosts.store);
  const aged = changedStore(old, {
    async *list(prefix) {
      for await (const item of hosts.store.list(prefix)) yield { ...item, modifiedMs: 0 };
    },
  });
  const b = await hosts.open("b", { through: () => aged });
  await assert.rejects(b.machine.deps.snapshotStore!.sweep(signal), { code: "host_error" });
  expect((await keysOf("blobs/")).length).toBeGreaterThan(0);
});

test("nothing that a manifest says leads out of where its files belong", async () => {
  const a = await hosts.open("a");
  await makeSnapshot(a);
  await stored(a);
  const text = (await read(await hosts.store.get(MANIFEST, { from: 0 }, signal))).toString();
  const good = storedSnapshotSchema.parse(JSON.parse(text));
  const file = good.memory.files["guest.json"]!;
  const bad: Record<string, unknown>[] = [
    { ...good, memory: { ...good.memory, files: { "../../../escaped": file } } },
    { ...good, memory: { ...good.memory, files: { "/etc/escaped": file } } },
    { ...good, memory: { ...good.memory, files: { "guest.json": { ...file, sha256: "../../x" } } } },
    { ...good, memory: { ...good.memory, files: { "guest.json": { ...file, bytes: 2 ** 50 } } } },
    { ...good, layers: Array.from({ length: 300 }, () => file) },
    { ...good, image: { ...good.image, hash: "../.." } },
    { ...good, vcpus: -1 },
  ];
  const b = await hosts.open("b");
  for (const [index, manifest] of bad.entries()) {
    await hosts.store.put(MANIFEST, pieces(Buffer.from(JSON.stringify(manifest)), 1 << 20), signal);
    await assert.rejects(startFrom(b, SNAP, sandboxId(`bad${index}`)), { code: "host_error" });
    expectNothingFetched("b");
  }
  // Of another snapshot: no such snapshot.
  await hosts.store.put(
    MANIFEST,
    pieces(Buffer.from(JSON.stringify({ ...good, id: snapshotId("other") })), 1 << 20),
    signal,
  );
  await assert.rejects(startFrom(b, SNAP, sandboxId("other")), { code: "template_not_found" });
});
