/** Many at once, and many one after the other: all answer, and nothing grows. */
import assert from "node:assert/strict";
import { readFileSync, readdirSync, statfsSync } from "node:fs";
import { afterEach, beforeAll, inject, test } from "vitest";
import { eventually } from "./api.ts";
import type { Api } from "./api.ts";
import { sizes, takeInventory } from "./host-inventory.ts";
import { Product } from "./product.ts";

const product = new Product(inject("product"));
/** The whole hundred takes a minute and more on two cores. */
const ROUNDS = process.env["ROOKERY_LONG"] ? 300 : 100;
let api: Api;

beforeAll(() => {
  api = product.api();
});
afterEach(async () => {
  await api.destroyAll();
});

test("20 sandboxes created at once all answer", async () => {
  const sandboxes = await Promise.all(Array.from({ length: 20 }, () => api.create()));
  const answers = await Promise.all(sandboxes.map(({ id }) => api.sh(id, `echo ${id}`)));
  assert.deepEqual(
    answers,
    sandboxes.map(({ id }) => id),
  );
});

test(`${ROUNDS} created and destroyed in sequence leave memory, file descriptors and disk where they were`, async () => {
  const round = async (): Promise<void> => {
    const { id } = await api.create();
    await api.exec(id, { cmd: "true" });
    await api.destroy(id);
  };
  // The first rounds fill caches and pools.
  for (let index = 0; index < 10; index += 1) await round();
  const before = await atRest();
  for (let index = 0; index < ROUNDS; index += 1) await round();
  const after = await atRest();
  assert.deepEqual(after.sizes, before.sizes);
  for (const name of ["agent", "control-plane"] as const) {
    const grown = after[name].rssMb - before[name].rssMb;
    assert.ok(grown < 40, `${name} grew by ${grown} MB`);
    const fds = after[name].fds - before[name].fds;
    assert.ok(fds <= 10, `${name} holds ${fds} more file descriptors`);
  }
  const disk = before.freeDiskMb - after.freeDiskMb;
  assert.ok(disk < 100, `${disk} MB of disk are gone`);
});

/** Once pools are full and nothing changes any more. */
async function atRest() {
  let last = "";
  let same = 0;
  const rested = await eventually("the host is at rest", 60_000, () => {
    const now = sizes(takeInventory(product.agentDataDir));
    same = JSON.stringify(now) === last ? same + 1 : 0;
    last = JSON.stringify(now);
    return same >= 40 ? now : undefined;
  });
  const { bavail, bsize } = statfsSync(product.agentDataDir);
  return {
    sizes: rested,
    agent: footprint(product.pid("agent")),
    "control-plane": footprint(product.pid("control-plane")),
    freeDiskMb: Math.round((bavail * bsize) / 1e6),
  };
}

function footprint(pid: number): { rssMb: number; fds: number } {
  const status = readFileSync(`/proc/${pid}/status`, "utf8");
  const rss = /VmRSS:\s+(\d+) kB/.exec(status)?.[1];
  assert.ok(rss !== undefined);
  return { rssMb: Number(rss) / 1024, fds: readdirSync(`/proc/${pid}/fd`).length };
}
