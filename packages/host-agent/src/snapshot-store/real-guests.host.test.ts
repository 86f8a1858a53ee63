/** Two agents of this machine, real guests, and a directory as the store between them. */
import assert from "node:assert/strict";
import { mkdtemp } from "node:fs/promises";
import { join } from "node:path";
import { expect, test } from "vitest";
import { removeTree } from "../host/atomic-file.ts";
import type { SandboxId, SnapshotId } from "../ids.ts";
import { TEST_DATA_DIR } from "../image/testing/test-image.ts";
import { openRealAgent, type RealAgent } from "../testing/real-agent.ts";

const SNAP = "snap-00000000000000000001" as SnapshotId;
const PATIENCE_MS = 280_000;

const COUNTER =
  "setsid sh -c 'i=0; while :; do i=$((i+1)); echo $i > /tmp/n; mv /tmp/n /tmp/count; sleep 0.05; done' </dev/null >/dev/null 2>&1 & until [ -e /tmp/count ]; do sleep 0.01; done";

const countOf = async (agent: RealAgent, id: SandboxId): Promise<number> =>
  Number(await agent.sh(id, "cat /tmp/count"));

test(
  "a snapshot of a running sandbox goes on on an agent that has neither its image nor its warm image",
  { timeout: 3 * PATIENCE_MS },
  async () => {
    await using held = new AsyncDisposableStack();
    const dir = await mkdtemp(join(TEST_DATA_DIR, "store-"));
    held.defer(() => removeTree(dir));
    const environment = { ROOKERY_OBJECT_STORE: `dir:${join(dir, "store")}` };
    const first = held.use(await openRealAgent(environment));
    const parent = await first.create();
    await first.sh(parent, COUNTER);
    await first.sh(parent, "head -c 3000000 /dev/urandom > /home/user/file && sync");
    const checksum = await first.sh(parent, "sha256sum < /home/user/file");
    const before = await countOf(first, parent);
    await first.agent.manager.createSnapshot(first.nextOperation(parent), SNAP, "team-1");
    await expect
      .poll(() => first.agent.manager.getSnapshots([SNAP])[0]?.storeId, { timeout: PATIENCE_MS })
      .toBeDefined();

    const elsewhere = { ...environment, ROOKERY_IMAGE_DIR: join(dir, "no-images") };
    const second = held.use(await openRealAgent(elsewhere, { warm: false }));
    const begin = performance.now();
    const child = await second.create({ kind: "snapshot", snapshotId: SNAP });
    const firstMs = performance.now() - begin;
    await expect.poll(() => countOf(second, child), { timeout: 60_000 }).toBeGreaterThan(before);
    assert.equal(await second.sh(child, "sha256sum < /home/user/file"), checksum);
    assert.equal(await second.sh(child, "hostname"), child);

    // Its copy is a snapshot like any other; and what it makes of it lives and moves.
    const again = performance.now();
    const sibling = await second.create({ kind: "snapshot", snapshotId: SNAP });
    console.log({ firstMs, cachedMs: performance.now() - again });
    assert.equal(await second.sh(sibling, "sha256sum < /home/user/file"), checksum);
    const atPause = await countOf(second, child);
    await second.agent.manager.pause(second.nextOperation(child));
    await second.agent.manager.resume(second.nextOperation(child));
    await expect.poll(() => countOf(second, child), { timeout: 60_000 }).toBeGreaterThan(atPause);

    await second.agent.manager.deleteSnapshot(SNAP);
    await first.agent.manager.deleteSnapshot(SNAP);
    // Sandboxes of a deleted snapshot stand on its layers all the same.
    assert.equal(await second.sh(child, "sha256sum < /home/user/file"), checksum);
    assert.equal(await first.sh(parent, "sha256sum < /home/user/file"), checksum);
  },
);
