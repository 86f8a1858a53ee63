import { strict as assert } from "node:assert";
import { existsSync } from "node:fs";
import { mkdtemp, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, test } from "vitest";
import { removeTree } from "../host/atomic-file.ts";
import { systemClock } from "../sandbox-manager/clock.ts";
import { CredentialStore } from "./credentials.ts";
import { END_FAILPOINTS, HostEnding } from "./host-ending.ts";

let dir: string;
const path = () => join(dir, "credentials.json");
const logger = { debug() {}, info() {}, warn() {}, error() {} };
const credentials = {
  version: 1,
  controlPlaneUrl: "http://127.0.0.1:1",
  hostId: "host-abcdefghijklmnopqrst",
  clusterId: "cluster-1",
  controlPlaneKey: "key",
  accessToken: "access",
  refreshToken: "refresh",
  privateKey: "private",
  registeredWith: "hash",
};

/** What a host has: destroying it takes one thing after the other. */
let left: Set<string>;
let failAt: string | undefined;
let reached: Set<string>;

beforeEach(async () => {
  dir = await mkdtemp(join(tmpdir(), "rookery-ending-"));
  await writeFile(path(), JSON.stringify(credentials));
  left = new Set(["sb1", "sb2"]);
  failAt = undefined;
  reached = new Set();
});
afterEach(() => removeTree(dir));

const endingOf = (store: CredentialStore, stuck: () => readonly string[] = () => []) =>
  new HostEnding({
    store,
    destroyEverything: async () => {
      const stays = stuck();
      for (const id of left) if (!stays.includes(id)) left.delete(id);
      return [...left].map((id) => ({ id, error: new Error("busy") }));
    },
    clock: { ...systemClock, after: (_ms, run) => systemClock.after(0, run) },
    logger,
    reach: (name) => {
      reached.add(name);
      if (name === failAt) throw new Error(`died at ${name}`);
    },
  });

test("a deleted host loses what it has, then its credentials, once", async () => {
  const store = await CredentialStore.open(dir);
  const ending = endingOf(store);
  await Promise.all([ending.end(), ending.end()]);
  assert.equal(left.size, 0);
  assert.equal(existsSync(path()), false);
  assert.equal(store.current, undefined);
  assert.equal(store.isEnding, false);
  assert(ending.signal.aborted);
});

test("it obeys nobody from the first line on", async () => {
  const store = await CredentialStore.open(dir);
  const ending = endingOf(store, () => {
    assert.equal(store.current, undefined);
    return [];
  });
  await ending.end();
});

test("an agent that dies at any line goes on with it at its next start", async () => {
  const names = END_FAILPOINTS.flatMap((name) => [`${name}.before`, `${name}.after`]);
  for (const name of names) {
    await writeFile(path(), JSON.stringify(credentials));
    left = new Set(["sb1", "sb2"]);
    failAt = name;
    const ending = endingOf(await CredentialStore.open(dir));
    await assert.rejects(ending.end(), /died at/);
    assert(ending.signal.aborted);
    failAt = undefined;
    const store = await CredentialStore.open(dir);
    if (name === "end-host.mark.before") {
      assert.equal(store.isEnding, false); // nothing was begun, and it will be told again
      assert.equal(left.size, 2);
      continue;
    }
    assert.equal(store.current, undefined, name);
    if (name === "end-host.forget.after") continue;
    assert.equal(store.isEnding, true, name);
    await endingOf(store).end();
    assert.equal(left.size, 0, name);
    assert.equal(existsSync(path()), false, name);
  }
  assert.deepEqual([...reached].sort(), names.sort());
});

test("what does not go is tried again, and for it the host stays marked", async () => {
  let busy = 1;
  await endingOf(await CredentialStore.open(dir), () => (busy-- > 0 ? ["sb2"] : [])).end();
  assert.equal(existsSync(path()), false);

  await writeFile(path(), JSON.stringify(credentials));
  left = new Set(["sb1", "sb2"]);
  const stuck = endingOf(await CredentialStore.open(dir), () => ["sb2"]);
  await assert.rejects(stuck.end(), { code: "host_error", message: /1 of what this host has/ });
  assert(stuck.signal.aborted);
  assert.equal((await CredentialStore.open(dir)).isEnding, true);
});
