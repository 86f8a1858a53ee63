import assert from "node:assert/strict";
import { RookeryError } from "@rookery/protocol/errors";
import { beforeAll, beforeEach, expect, test } from "vitest";
import { findSandbox } from "../db/sandboxes.ts";
import { teamQuota } from "../db/teams.ts";
import { failing, holding } from "../hosts/testing/fake-agent.ts";
import type { SandboxId } from "../model/ids.ts";
import type { Caller } from "./services.ts";
import { DEFAULTS, type TestHost, type TestPlane, useTestPlane } from "./testing/test-plane.ts";

const openPlane = useTestPlane({ leaseMs: 600, maxSandboxesPerTeam: 50 });
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

const create = () => plane.services.createSandbox(caller, DEFAULTS);
const rowOf = async (id: SandboxId) => {
  const row = await findSandbox(plane.deps.db, caller.teamId, id);
  assert.ok(row);
  return row;
};
const liveOf = async (who: Caller) => (await teamQuota(plane.deps.db, who.teamId))?.live;
const code = (wanted: string, details?: object) => (cause: unknown) => {
  assert.ok(cause instanceof RookeryError, String(cause));
  assert.equal(cause.code, wanted);
  if (details) assert.deepEqual(cause.details, details);
  return true;
};

test("a sandbox is made, paused, resumed and destroyed, and its host was told each step once", async () => {
  const made = await create();
  assert.equal(made.status, "running");
  assert.equal(made.hostId, host.id);
  assert.ok(made.startedAt && made.expiresAt);
  assert.equal((await plane.services.pauseSandbox(caller, made.id)).status, "paused");
  assert.equal((await plane.services.resumeSandbox(caller, made.id)).status, "running");
  await plane.services.destroySandbox(caller, made.id);
  assert.equal((await rowOf(made.id)).status, "stopped");
  assert.ok(!host.agent.sandboxes.has(made.id));
  const generations = host.agent.calls.filter(({ id }) => id === made.id).map(({ generation }) => generation);
  assert.deepEqual(generations, [1n, 3n, 5n, 7n]);
  assert.equal(await liveOf(caller), 0);
  await plane.services.destroySandbox(caller, made.id);
});

test("its access token is derived, and differs between sandboxes", async () => {
  const [one, other] = await Promise.all([create(), create()]);
  const token = (id: SandboxId) => host.agent.sandboxes.get(id)?.envdAccessToken;
  assert.equal(token(one.id), plane.deps.cluster.envdAccessToken({ id: one.id, tokenVersion: 1 }));
  assert.notEqual(token(one.id), token(other.id));
});

test("another team finds nothing, whatever it calls", async () => {
  const { id } = await create();
  const stranger = await plane.newCaller("platform");
  const { services } = plane;
  const input = { cmd: "true", args: [], shell: false, env: {}, timeoutSec: 1 };
  const signal = AbortSignal.timeout(5_000);
  await assert.rejects(services.getSandbox(stranger, id), code("not_found"));
  await assert.rejects(services.pauseSandbox(stranger, id), code("not_found"));
  await assert.rejects(services.resumeSandbox(stranger, id), code("not_found"));
  await assert.rejects(services.destroySandbox(stranger, id), code("not_found"));
  await assert.rejects(services.pingSandbox(stranger, id), code("not_found"));
  await assert.rejects(services.exec(stranger, id, input, signal), code("not_found"));
  await assert.rejects(services.readFile(stranger, id, "/x", signal), code("not_found"));
  await assert.rejects(services.updateSandbox(stranger, id, { timeoutSec: 10 }), code("not_found"));
  await assert.rejects(
    services.createSnapshot(stranger, { sandboxId: id, name: "theirs", overwrite: false }),
    code("not_found"),
  );
  assert.equal((await rowOf(id)).status, "running");
});

test("what does not fit a sandbox's status is a wrong_state that names the status", async () => {
  const { id } = await create();
  await assert.rejects(plane.services.resumeSandbox(caller, id), code("wrong_state", { status: "running" }));
  await plane.services.pauseSandbox(caller, id);
  await assert.rejects(plane.services.pauseSandbox(caller, id), code("wrong_state", { status: "paused" }));
  await assert.rejects(plane.services.pingSandbox(caller, id), code("wrong_state", { status: "paused" }));
  await plane.services.destroySandbox(caller, id);
  await assert.rejects(plane.services.resumeSandbox(caller, id), code("wrong_state", { status: "stopped" }));
  await assert.rejects(
    plane.services.updateSandbox(caller, id, { metadata: {} }),
    code("wrong_state", { status: "stopped" }),
  );
});

test("a create that its host fails is an error, in the answer and in the row, and frees its quota", async () => {
  host.agent.after = failing("createSandbox", "guest_error");
  await assert.rejects(create(), code("guest_error"));
  const { items } = await plane.services.listSandboxes(caller, {
    statuses: ["error"],
    metadata: {},
    limit: 10,
  });
  assert.equal(items[0]?.error?.code, "guest_error");
  assert.ok(items[0].endedAt);
  assert.ok(!host.agent.sandboxes.has(items[0].id), "what it made all the same was destroyed");
  assert.equal(await liveOf(caller), 0);
});

test("a create goes on to another host when one has no room, and only then fails", async () => {
  const other = await plane.newHost();
  try {
    const full = failing("createSandbox", "no_capacity");
    host.agent.before = full;
    for (let index = 0; index < 3; index++) assert.equal((await create()).hostId, other.id);
    other.agent.before = full;
    await assert.rejects(create(), code("no_capacity"));
    assert.equal(await liveOf(caller), 3);
  } finally {
    await removeHost(other);
  }
});

test("a create goes on when a host does not answer, and says so when none does", async () => {
  const other = await plane.newHost();
  await other.agent.close();
  const made = await Promise.all([create(), create()]);
  assert.deepEqual(new Set(made.map(({ hostId }) => hostId)), new Set([host.id]));
  host.agent.before = failing("createSandbox", "unavailable");
  await assert.rejects(create(), code("host_unreachable"));
  await removeHost(other);
});

test("a sandbox that is destroyed while it starts ends, and its creator hears of it", async () => {
  const hold = holding("createSandbox");
  host.agent.before = hold.hook;
  const creating = create();
  await hold.arrived;
  const { items } = await plane.services.listSandboxes(caller, { statuses: [], metadata: {}, limit: 1 });
  assert.ok(items[0]);
  const destroying = plane.services.destroySandbox(caller, items[0].id);
  await destroying;
  hold.release();
  await assert.rejects(creating, code("wrong_state"));
  assert.equal((await rowOf(items[0].id)).status, "stopped");
  assert.ok(!host.agent.sandboxes.has(items[0].id), "the late create was refused by its generation");
});

test("work that takes longer than a lease is not settled by the sweep of a living replica", async () => {
  const hold = holding("createSandbox");
  host.agent.before = hold.hook;
  const creating = create();
  await hold.arrived;
  const before = await plane.services.listSandboxes(caller, { statuses: [], metadata: {}, limit: 1 });
  const row = await rowOf(before.items[0]?.id as SandboxId);
  await expect
    .poll(async () => (await rowOf(row.id)).operationDeadline?.getTime(), { timeout: 5_000 })
    .toBeGreaterThan(row.operationDeadline?.getTime() ?? Infinity);
  hold.release();
  assert.equal((await creating).status, "running");
});

test("a pause that its host refuses goes back to running, with the reason shown", async () => {
  const { id } = await create();
  host.agent.before = failing("pauseSandbox", "out_of_disk");
  await assert.rejects(plane.services.pauseSandbox(caller, id), code("out_of_disk"));
  const row = await rowOf(id);
  assert.equal(row.status, "running");
  assert.equal(row.error?.code, "out_of_disk");
  host.agent.before = () => undefined;
  const paused = await plane.services.pauseSandbox(caller, id);
  assert.equal(paused.error, undefined);
});

test("a resume that its host refuses goes back to paused, with the reason shown", async () => {
  const { id } = await create();
  await plane.services.pauseSandbox(caller, id);
  host.agent.before = failing("resumeSandbox", "no_capacity");
  await assert.rejects(plane.services.resumeSandbox(caller, id), code("no_capacity"));
  const row = await rowOf(id);
  assert.equal(row.status, "paused");
  assert.equal(row.error?.code, "no_capacity");
});

test("a pause whose answer is lost is a pause", async () => {
  const { id } = await create();
  host.agent.after = failing("pauseSandbox", "host_error");
  assert.equal((await plane.services.pauseSandbox(caller, id)).status, "paused");
});

test("a pause that kills its VM shows the sandbox's end", async () => {
  const { id } = await create();
  host.agent.before = (call) => {
    const sandbox = host.agent.sandboxes.get(id);
    if (call.method !== "pauseSandbox" || !sandbox) return;
    sandbox.phase = "FAILED";
    sandbox.exit = { code: "guest_error", message: "the VMM ended" };
    throw new RookeryError("guest_error", "the VMM ended");
  };
  await assert.rejects(plane.services.pauseSandbox(caller, id), code("guest_error"));
  const row = await rowOf(id);
  assert.equal(row.status, "error");
  assert.equal(row.error?.message, "the VMM ended");
  assert.ok(!host.agent.sandboxes.has(id), "what was left of it was released");
});

test("a pause whose host dies in the middle stays pausing, and is a host_unreachable", async () => {
  const lonely = await plane.newHost();
  const made = await createOn(lonely);
  lonely.agent.before = async (call) => {
    if (call.method === "pauseSandbox") await lonely.agent.close();
  };
  await assert.rejects(plane.services.pauseSandbox(caller, made), code("host_unreachable"));
  assert.equal((await rowOf(made)).status, "pausing");
  await removeHost(lonely);
});

test("of pause and destroy at the same time, the sandbox ends and nothing is left", async () => {
  for (let round = 0; round < 10; round++) {
    const { id } = await create();
    const [paused, destroyed] = await Promise.allSettled([
      plane.services.pauseSandbox(caller, id),
      plane.services.destroySandbox(caller, id),
    ]);
    assert.equal(destroyed.status, "fulfilled");
    if (paused.status === "rejected") {
      const { code: seen } = paused.reason as RookeryError;
      assert.equal(seen, "wrong_state");
    }
    assert.equal((await rowOf(id)).status, "stopped");
    assert.ok(!host.agent.sandboxes.has(id));
  }
});

test("destroys at the same time join, and all wait for the end", async () => {
  const { id } = await create();
  const hold = holding("destroySandbox");
  host.agent.before = hold.hook;
  let ended = 0;
  const all = Array.from({ length: 4 }, async () => {
    await plane.services.destroySandbox(caller, id);
    ended++;
  });
  await hold.arrived;
  assert.equal(ended, 0);
  hold.release();
  await Promise.all(all);
  assert.equal((await rowOf(id)).status, "stopped");
  assert.equal(
    new Set(
      host.agent
        .callsOf("destroySandbox")
        .filter((call) => call.id === id)
        .map(({ generation }) => generation),
    ).size,
    1,
  );
});

test("destroying what its silent host may still have leaves it stopping", async () => {
  const lonely = await plane.newHost();
  const id = await createOn(lonely);
  await plane.deps.db
    .updateTable("hosts")
    .set({ status: "unreachable" })
    .where("id", "=", lonely.id)
    .execute();
  await plane.services.destroySandbox(caller, id);
  assert.equal((await rowOf(id)).status, "stopping");
  await plane.services.destroySandbox(caller, id);
  await removeHost(lonely);
});

test("a paused sandbox of a silent host stays paused, and its resume is a host_unreachable", async () => {
  const lonely = await plane.newHost();
  const id = await createOn(lonely);
  await plane.services.pauseSandbox(caller, id);
  await plane.deps.db
    .updateTable("hosts")
    .set({ status: "unreachable" })
    .where("id", "=", lonely.id)
    .execute();
  await assert.rejects(plane.services.resumeSandbox(caller, id), code("host_unreachable"));
  assert.equal((await rowOf(id)).status, "paused");
  await removeHost(lonely);
});

test("a team's quota is exact, however many creates come at once, and a destroy frees it", async () => {
  await plane.deps.db
    .updateTable("teams")
    .set({ max_sandboxes: 5 })
    .where("id", "=", caller.teamId)
    .execute();
  const results = await Promise.allSettled(Array.from({ length: 12 }, create));
  const made = results.filter((result) => result.status === "fulfilled").map(({ value }) => value);
  assert.equal(made.length, 5);
  for (const result of results) if (result.status === "rejected") code("quota_exceeded")(result.reason);
  await plane.services.destroySandbox(caller, made[0]?.id as SandboxId);
  await create();
  await assert.rejects(create(), code("quota_exceeded"));
});

test("a shape that the template can't have is unsupported, before anything is made", async () => {
  const { services } = plane;
  const asks = (shape: object) => services.createSandbox(caller, { ...DEFAULTS, ...shape });
  await assert.rejects(asks({ vcpus: 3 }), code("unsupported_shape"));
  await assert.rejects(asks({ memoryMb: 500 }), code("unsupported_shape"));
  await assert.rejects(asks({ diskMb: 4095 }), code("unsupported_shape"));
  await assert.rejects(asks({ diskMb: 65_537 }), code("unsupported_shape"));
  await assert.rejects(asks({ template: "nothing" }), code("template_not_found"));
  assert.equal(await liveOf(caller), 0);
  const made = await asks({ vcpus: 2, memoryMb: 1024, diskMb: 8192, template: "tpl-base0000000000000000" });
  assert.deepEqual([made.vcpus, made.memoryMb, made.diskMb, made.template], [2, 1024, 8192, "base"]);
});

/** A sandbox on that host, whichever others there are. */
async function createOn(wanted: TestHost): Promise<SandboxId> {
  for (let tries = 0; tries < 10; tries++) {
    const made = await create();
    if (made.hostId === wanted.id) return made.id;
  }
  throw new Error("the scheduler never picked it");
}

async function removeHost({ id }: TestHost): Promise<void> {
  await plane.deps.db.updateTable("hosts").set({ draining: true }).where("id", "=", id).execute();
}
