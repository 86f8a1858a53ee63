/** SIGKILL of the agent and of the control plane: nothing is lost, nothing leaks, every row is true. */
import assert from "node:assert/strict";
import { afterEach, beforeAll, expect, inject, test } from "vitest";
import { eventually } from "./api.ts";
import type { Api, ApiError, ExecAnswer, Sandbox } from "./api.ts";
import { sizes, takeInventory } from "./host-inventory.ts";
import { Product } from "./product.ts";

const product = new Product(inject("product"));
let api: Api;

beforeAll(() => {
  api = product.api();
});
afterEach(async () => {
  await product.up();
  await api.destroyAll();
});

test("a killed agent finds its sandboxes again, running and paused", async () => {
  const running = await Promise.all([api.create(), api.create(), api.create()]);
  const paused = await api.create();
  for (const sandbox of [...running, paused]) await api.sh(sandbox.id, `echo ${sandbox.id} > /tmp/mine`);
  await api.pause(paused.id);

  await product.kill9("agent");
  await product.up();

  for (const sandbox of running) {
    await eventually(`${sandbox.id} takes commands`, 10_000, async () => {
      const answer = await api.call<{ stdout: string }>("POST", `/v1/sandboxes/${sandbox.id}/exec`, {
        cmd: "cat",
        args: ["/tmp/mine"],
      });
      return answer.status === 200 && answer.body.stdout.trim() === sandbox.id ? true : undefined;
    });
  }
  assert.equal((await api.get(paused.id)).status, "paused");
  await api.resume(paused.id);
  assert.equal(await api.sh(paused.id, "cat /tmp/mine"), paused.id);
  const inventory = takeInventory(product.agentDataDir);
  assert.deepEqual(
    inventory.sandboxDirs.toSorted(),
    [...running, paused].map((sandbox) => sandbox.id).toSorted(),
  );
});

test("a control plane killed in the middle of 20 creates leaves no row unsettled and no VM without a row", async () => {
  const creates = Array.from({ length: 20 }, () =>
    api.call<Sandbox>("POST", "/v1/sandboxes", {}).then(
      (answer) => answer.status,
      () => "cut off",
    ),
  );
  await eventually("some creates are under way", 10_000, async () =>
    (await api.live()).length >= 5 ? true : undefined,
  );
  await product.kill9("control-plane");
  await Promise.all(creates);
  await product.up();

  const settled = ["running", "paused", "stopped", "error"];
  const rows = await eventually("every row is settled", 120_000, async () => {
    const all = await allRows();
    return all.every((row) => settled.includes(row.status)) ? all : undefined;
  });
  for (const row of rows.filter((each) => each.status === "running")) await api.sh(row.id, "true");
  const alive = new Set(
    rows.filter((row) => ["running", "paused"].includes(row.status)).map((row) => row.id),
  );
  await eventually("no VM without a live row", 120_000, () =>
    takeInventory(product.agentDataDir).sandboxDirs.every((id) => alive.has(id)) ? true : undefined,
  );
});

test("an agent killed at any moment of a pause or a resume ends with the sandbox whole", async () => {
  const { id } = await api.create();
  await api.sh(id, "echo precious > /tmp/precious; sync");
  // Spread over the some hundred milliseconds that an operation takes.
  for (const [index, delayMs] of [0, 20, 50, 90, 140, 220].entries()) {
    const call = index % 2 === 0 ? "pause" : "resume";
    const pending = api.call("POST", `/v1/sandboxes/${id}/${call}`).catch(() => undefined);
    await new Promise((resolve) => setTimeout(resolve, delayMs));
    await product.kill9("agent");
    await pending;
    await product.restartAgent();
    const status = await eventually("the row is settled", 120_000, async () => {
      const row = await api.get(id);
      return ["running", "paused"].includes(row.status) ? row.status : undefined;
    });
    if (status === "paused" && index % 2 === 0) continue;
    if (status === "paused") await api.resume(id);
    assert.equal(await api.sh(id, "cat /tmp/precious"), "precious");
    if (index % 2 === 0) await api.pause(id);
  }
});

test("`down` and `up` again: nothing of the old run is left, and the product works", async () => {
  await api.create();
  await product.down();
  const inventory = takeInventory(product.agentDataDir);
  expect(sizes(inventory)).toMatchObject({ vmms: 0, vmDirs: 0, sandboxDirs: 0 });
  await product.up();
  const { id } = await api.create();
  await api.sh(id, "true");
});

async function allRows(): Promise<Sandbox[]> {
  const items: Sandbox[] = [];
  for (const status of [
    "pending",
    "starting",
    "running",
    "paused",
    "stopping",
    "stopped",
    "error",
    "missing",
  ]) {
    const page = await api.must<{ items: Sandbox[] }>(200, "GET", `/v1/sandboxes?status=${status}&limit=100`);
    items.push(...page.items);
  }
  return items;
}

test("an envd that is killed in its guest is had back, with the guest and its programs as they were", async () => {
  const { id } = await api.create({ env: { MINE: "yes" } });
  const guest = () => api.sh(id, "cat /proc/sys/kernel/random/boot_id; pgrep -x sleep; hostname; echo $MINE");
  await api.sh(id, "setsid sleep 1000 </dev/null >/dev/null 2>&1 &");
  const before = await guest();
  const envd = await api.sh(id, "pgrep -f /usr/lib/rookery/envd.mjs");

  // The call itself breaks: whether the command did all that it was to do nobody knows.
  const cut = await api.call<ApiError>("POST", `/v1/sandboxes/${id}/exec`, {
    cmd: "sudo pkill -9 -f /usr/lib/rookery/envd.mjs; sleep 60",
    shell: true,
  });
  assert.equal(cut.status, 502);
  assert.equal(cut.body.error.code, "guest_error");

  const first = await eventually("commands run again", 60_000, async () => {
    const answer = await api.call<ExecAnswer & ApiError>("POST", `/v1/sandboxes/${id}/exec`, {
      cmd: "pgrep",
      args: ["-f", "/usr/lib/rookery/envd.mjs"],
    });
    if (answer.status === 200) return answer.body;
    assert.equal(answer.body.error.code, "guest_error");
    assert.equal(answer.headers.get("retry-after"), "3");
    return undefined;
  });
  assert.notEqual(first.stdout.trim(), envd);
  assert.equal(await guest(), before);
  await api.writeFile(id, "/tmp/file", Buffer.from("content"));
  assert.equal(Buffer.from(await api.readFile(id, "/tmp/file")).toString(), "content");
  // And it moves as before.
  await api.pause(id);
  await api.resume(id);
  assert.equal(await guest(), before);
});
