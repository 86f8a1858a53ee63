import assert from "node:assert/strict";
import { setTimeout as sleep } from "node:timers/promises";
import { beforeAll, beforeEach, expect, test } from "vitest";
import { findSandbox } from "../db/sandboxes.ts";
import { failing, holding } from "../hosts/testing/fake-agent.ts";
import type { SandboxId } from "../model/ids.ts";
import type { Caller, ExecInput } from "./services.ts";
import { bootstrap } from "./teams-and-keys.ts";
import { DEFAULTS, type TestHost, type TestPlane, useTestPlane } from "./testing/test-plane.ts";

const openPlane = useTestPlane({ cacheMs: 50 });
const signal = AbortSignal.timeout(120_000);
let plane: TestPlane;
let host: TestHost;
let caller: Caller;

beforeAll(async () => {
  plane = await openPlane();
  host = await plane.newHost();
});
beforeEach(async () => {
  host.agent.before = () => undefined;
  host.agent.after = () => undefined;
  caller = await plane.newCaller();
});

const create = async (who = caller): Promise<SandboxId> =>
  (await plane.services.createSandbox(who, DEFAULTS)).id;
const statusOf = async (id: SandboxId) => (await findSandbox(plane.deps.db, caller.teamId, id))?.status;
const echo: ExecInput = { cmd: "echo", args: ["hi"], shell: false, env: {}, timeoutSec: 5 };

test("a command runs in the guest, and its output comes back", async () => {
  const id = await create();
  const { stdout, exitCode } = await plane.services.exec(caller, id, echo, signal);
  assert.deepEqual([Buffer.from(stdout).toString(), exitCode], ["echo hi", 0]);
});

test("files go in and come out", async () => {
  const id = await create();
  const bytes = Buffer.alloc(300_000, "x");
  await plane.services.writeFile(
    caller,
    id,
    "/tmp/f",
    (async function* () {
      yield bytes;
    })(),
    signal,
  );
  const { sizeBytes, content } = await plane.services.readFile(caller, id, "/tmp/f", signal);
  assert.equal(sizeBytes, bytes.length);
  const read: Uint8Array[] = [];
  for await (const chunk of content) read.push(chunk);
  assert.ok(Buffer.concat(read).equals(bytes));
});

test("a caller of a sandbox that expired a moment ago hears what it is now, and so does the row", async () => {
  const id = await create();
  const fake = host.agent.sandboxes.get(id);
  assert.ok(fake);
  fake.phase = "PAUSED";
  await assert.rejects(plane.services.exec(caller, id, echo, signal), {
    code: "wrong_state",
    details: { status: "paused" },
  });
  assert.equal(await statusOf(id), "paused");
  host.agent.sandboxes.delete(id);
  assert.equal((await plane.services.getSandbox(caller, id)).status, "error");
});

test("looking at a sandbox shows its host's expiry and disk, and the row's where the host is slow", async () => {
  const id = await create();
  const seen = await plane.services.getSandbox(caller, id);
  assert.equal(seen.diskUsedBytes, 12_288);
  host.agent.before = failing("getSandbox", "host_error");
  assert.equal((await plane.services.getSandbox(caller, id)).status, "running");
});

test("a lifetime changes on the host and in the row together", async () => {
  const id = await create();
  const changed = await plane.services.updateSandbox(caller, id, { timeoutSec: 0, onTimeout: "destroy" });
  assert.deepEqual([changed.timeoutSec, changed.onTimeout, changed.expiresAt], [0, "destroy", undefined]);
  assert.equal(host.agent.sandboxes.get(id)?.timeoutSec, 0);
  host.agent.before = failing("updateSandbox", "host_error");
  await assert.rejects(plane.services.updateSandbox(caller, id, { timeoutSec: 99 }), { code: "host_error" });
  assert.equal((await plane.services.updateSandbox(caller, id, { metadata: { a: "b" } })).timeoutSec, 0);
});

const snapshot = (sandboxId: SandboxId, name: string, overwrite = false) =>
  plane.services.createSnapshot(caller, { sandboxId, name, overwrite });

test("a snapshot is made, listed, used as a template in its own shape, and deleted", async () => {
  const id = await create();
  const made = await snapshot(id, "ready-to-go");
  assert.deepEqual([made.name, made.sizeBytes, made.vcpus], ["ready-to-go", 5_000_000_000, 1]);
  assert.equal(await statusOf(id), "running");
  const names = async () =>
    (await plane.services.listTemplates(caller, { limit: 10 })).items.map(({ name }) => name);
  assert.deepEqual(new Set(await names()), new Set(["base", "ready-to-go"]));
  for (const template of ["ready-to-go", made.id]) {
    const clone = await plane.services.createSandbox(caller, { ...DEFAULTS, template });
    assert.equal(clone.template, "ready-to-go");
    assert.equal(host.agent.sandboxes.get(clone.id)?.source, made.id);
  }
  await assert.rejects(
    plane.services.createSandbox(caller, { ...DEFAULTS, template: "ready-to-go", memoryMb: 1024 }),
    { code: "unsupported_shape" },
  );
  await plane.services.deleteSnapshot(caller, "ready-to-go");
  assert.ok(!host.agent.snapshots.has(made.id));
  assert.deepEqual(await names(), ["base"]);
  await assert.rejects(plane.services.deleteSnapshot(caller, "ready-to-go"), { code: "not_found" });
});

test("a snapshot of a paused sandbox leaves it paused", async () => {
  const id = await create();
  await plane.services.pauseSandbox(caller, id);
  await snapshot(id, "asleep");
  assert.equal(await statusOf(id), "paused");
  assert.equal((await plane.services.resumeSandbox(caller, id)).status, "running");
});

test("a name is taken once in a team, by no other team's, and never from the platform", async () => {
  const id = await create();
  await snapshot(id, "mine");
  await assert.rejects(snapshot(id, "mine"), { code: "already_exists" });
  await assert.rejects(snapshot(id, "base"), { code: "already_exists" });
  await assert.rejects(snapshot(id, "base", true), { code: "already_exists" });
  await assert.rejects(snapshot(id, "No Good"), { code: "invalid_request" });
  const other = await plane.newCaller();
  const theirs = await create(other);
  await plane.services.createSnapshot(other, { sandboxId: theirs, name: "mine", overwrite: false });
  await assert.rejects(
    plane.services.createSandbox(await plane.newCaller(), { ...DEFAULTS, template: "mine" }),
    {
      code: "template_not_found",
    },
  );
});

test("a replacement takes the name over when it is ready, and the one before goes", async () => {
  const id = await create();
  const old = await snapshot(id, "latest");
  host.agent.before = failing("createSnapshot", "out_of_disk");
  await assert.rejects(snapshot(id, "latest", true), { code: "out_of_disk" });
  const { items } = await plane.services.listSnapshots(caller, { limit: 10 });
  assert.deepEqual(
    items.map((item) => item.id),
    [old.id],
  );
  host.agent.before = () => undefined;
  const next = await snapshot(id, "latest", true);
  const after = await plane.services.listSnapshots(caller, { limit: 10 });
  assert.deepEqual(
    after.items.map((item) => item.id),
    [next.id],
  );
});

test("of snapshots at the same time with one name, one gets it and nothing else is left", async () => {
  const id = await create();
  const before = host.agent.snapshots.size;
  const results = await Promise.allSettled(Array.from({ length: 4 }, () => snapshot(id, "contended")));
  assert.equal(results.filter(({ status }) => status === "fulfilled").length, 1);
  for (const result of results) {
    if (result.status === "rejected") {
      assert.equal((result.reason as { code: string }).code, "already_exists");
    }
  }
  assert.equal(host.agent.snapshots.size, before + 1);
});

test("a key is shown once, works under both prefixes, and ends with its deletion", async () => {
  const { services, deps } = plane;
  const { key, apiKey } = await services.createApiKey(caller, { name: "ci", role: "member" });
  assert.match(key, /^rk_[0-9a-f]{40}$/);
  assert.equal(apiKey.prefix, key.slice(0, 8));
  const known = await services.authenticate(key);
  assert.deepEqual(known, { keyId: apiKey.id, teamId: caller.teamId, role: "member" });
  assert.deepEqual(await services.authenticate(key.replace("rk_", "e2b_")), known);
  const rows = await deps.db.selectFrom("api_keys").selectAll().where("id", "=", apiKey.id).execute();
  assert.ok(!JSON.stringify(rows).includes(key.slice(3)));
  assert.ok(rows[0]?.last_used_at);
  await assert.rejects(services.deleteApiKey(await plane.newCaller(), apiKey.id), { code: "not_found" });
  await services.deleteApiKey(caller, apiKey.id);
  await assert.rejects(services.authenticate(key), { code: "unauthenticated" });
});

test("when a key was last used is noted once a minute", async () => {
  const { key, apiKey } = await plane.services.createApiKey(caller, { name: "x", role: "member" });
  const usedAt = async () =>
    (await plane.services.listApiKeys(caller, { limit: 10 })).items.find(({ id }) => id === apiKey.id)
      ?.lastUsedAt;
  const use = async () => {
    await sleep(60);
    await plane.services.authenticate(key);
    return (await usedAt())?.getTime();
  };
  assert.equal(await usedAt(), undefined);
  const first = await use();
  assert.equal(await use(), first);
  await plane.deps.db
    .updateTable("api_keys")
    .set({ last_used_at: new Date(Date.now() - 61_000) })
    .where("id", "=", apiKey.id)
    .execute();
  assert.ok(((await use()) ?? 0) >= (first ?? Infinity));
});

test("a key that is deleted by another replica is forgotten within the cache's time", async () => {
  const { key, apiKey } = await plane.services.createApiKey(caller, { name: "x", role: "member" });
  await plane.services.authenticate(key);
  await plane.deps.db.deleteFrom("api_keys").where("id", "=", apiKey.id).execute();
  await expect
    .poll(() =>
      plane.services.authenticate(key).then(
        () => "known",
        (cause: { code: string }) => cause.code,
      ),
    )
    .toBe("unauthenticated");
});

test("what is no key is unauthenticated, whatever it looks like", async () => {
  const hex = "0".repeat(40);
  for (const text of [
    "",
    "rk_",
    `rk_${hex}`,
    `RK_${hex}`,
    `rk_${hex}0`,
    ` rk_${hex}`,
    `rk_${"Z".repeat(40)}`,
    "\0",
  ]) {
    await assert.rejects(plane.services.authenticate(text), { code: "unauthenticated" });
  }
});

test("only the platform makes platform keys and teams", async () => {
  const { services } = plane;
  await assert.rejects(services.createApiKey(caller, { name: "x", role: "platform" }), { code: "forbidden" });
  await assert.rejects(services.createTeam(caller, { name: "x" }), { code: "forbidden" });
  await assert.rejects(services.listTeams(caller, { limit: 1 }), { code: "forbidden" });
  const operator = await plane.newCaller("platform");
  const { team, key } = await services.createTeam(operator, { name: "research" });
  assert.deepEqual(
    [(await services.authenticate(key)).teamId, (await services.authenticate(key)).role],
    [team.id, "member"],
  );
  await assert.rejects(services.createTeam(operator, { name: "research" }), { code: "already_exists" });
  assert.ok((await services.listTeams(operator, { limit: 200 })).items.some(({ id }) => id === team.id));
});

test("bootstrap makes the default team and one key, and another only when asked", async () => {
  const first = await bootstrap(plane.deps, { newKey: false });
  assert.ok(first.key);
  assert.deepEqual(await bootstrap(plane.deps, { newKey: false }), { team: first.team, key: undefined });
  const second = await bootstrap(plane.deps, { newKey: true });
  assert.ok(second.key && second.key !== first.key);
  assert.equal((await plane.services.authenticate(second.key)).role, "platform");
});

test("twenty creates at once, each with its own key and guest, take no turns", async () => {
  const hold = holding("createSandbox");
  host.agent.before = hold.hook;
  const creating = Array.from({ length: 20 }, () => create());
  await expect
    .poll(() => host.agent.callsOf("createSandbox").length, { timeout: 10_000 })
    .toBeGreaterThanOrEqual(20);
  hold.release();
  assert.equal(new Set(await Promise.all(creating)).size, 20);
});
