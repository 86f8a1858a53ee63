/** The life of a sandbox as a user leads it, over HTTP, on a real guest. */
import assert from "node:assert/strict";
import { createHash, randomBytes } from "node:crypto";
import { afterEach, beforeAll, describe, inject, test } from "vitest";
import { eventually } from "./api.ts";
import type { Api } from "./api.ts";
import { sizes, takeInventory } from "./host-inventory.ts";
import { Product } from "./product.ts";

const product = new Product(inject("product"));
let api: Api;

beforeAll(() => {
  api = product.api();
});
afterEach(async () => {
  await api.destroyAll();
});

const sha256 = (bytes: Uint8Array): string => createHash("sha256").update(bytes).digest("hex");

/** A counter in the background, and what it shows now. */
const startCounter = (id: string): Promise<string> =>
  api.sh(
    id,
    "nohup sh -c 'i=0; while :; do i=$((i+1)); echo $i > /tmp/counter; sleep 0.05; done' >/dev/null 2>&1 &",
  );
const readCounter = async (id: string): Promise<number> =>
  Number(await api.sh(id, "until [ -s /tmp/counter ]; do sleep 0.02; done; cat /tmp/counter"));

describe("a sandbox", () => {
  test("runs commands on a kernel of its own", async () => {
    const sandbox = await api.create();
    assert.match(sandbox.id, /^sb[a-z0-9]{18}$/);
    assert.equal(sandbox.status, "running");
    const uname = await api.exec(sandbox.id, { cmd: "uname", args: ["-a"] });
    assert.equal(uname.exit_code, 0);
    assert.match(uname.stdout, /Linux .* x86_64|Linux .* aarch64/);
    const hostKernel = (await import("node:os")).release();
    assert.ok(!uname.stdout.includes(hostKernel), "the guest shows the host's kernel");
    assert.equal(await api.sh(sandbox.id, "python3 -c 'print(6*7)'"), "42");
    assert.match(await api.sh(sandbox.id, "git --version"), /^git version 2\./);
    assert.equal(await api.sh(sandbox.id, "id -un"), "user");
  });

  test("says what a command did: exit code, signal, time-out, cut and binary output", async () => {
    const { id } = await api.create();
    const failing = await api.exec(id, { cmd: "echo out; echo err >&2; exit 3", shell: true });
    assert.deepEqual([failing.stdout, failing.stderr, failing.exit_code], ["out\n", "err\n", 3]);
    assert.equal(failing.encoding, "utf-8");

    const late = await api.exec(id, { cmd: "sleep 600 & sleep 600", shell: true, timeout_sec: 1 });
    assert.equal(late.timed_out, true);
    assert.equal(await api.sh(id, "pgrep -c sleep || true"), "0");

    const killed = await api.exec(id, { cmd: "kill -9 $$", shell: true });
    assert.equal(killed.signal, "SIGKILL");

    const binary = await api.exec(id, { cmd: "printf '\\377\\376\\000'", shell: true });
    assert.equal(binary.encoding, "base64");
    assert.deepEqual([...Buffer.from(binary.stdout, "base64")], [0xff, 0xfe, 0]);

    const long = await api.exec(id, { cmd: "head -c 5000000 /dev/zero | tr '\\0' x", shell: true });
    assert.equal(long.truncated, true);
    assert.equal(long.stdout.length, 4 * 1024 * 1024);

    const piped = await api.exec(id, { cmd: "cat", stdin: "héllo" });
    assert.equal(piped.stdout, "héllo");
  });

  test("keeps 50 MB of random bytes, its processes and its files through pause and resume", async () => {
    const { id } = await api.create();
    const content = randomBytes(50_000_000);
    await api.writeFile(id, "/home/user/random.bin", content);
    assert.equal(sha256(await api.readFile(id, "/home/user/random.bin")), sha256(content));
    await startCounter(id);
    const before = await readCounter(id);
    const withIt = takeInventory(product.agentDataDir);

    const paused = await api.pause(id);
    assert.equal(paused.status, "paused");
    await eventually("its VMM is gone", 5_000, () =>
      takeInventory(product.agentDataDir).sandboxDirs.includes(id) &&
      withIt.vmms.some((pid) => !takeInventory(product.agentDataDir).vmms.includes(pid))
        ? true
        : undefined,
    );
    const refused = await api.call("POST", `/v1/sandboxes/${id}/exec`, { cmd: "true" });
    assert.equal(refused.status, 409);

    const resumed = await api.resume(id);
    assert.equal(resumed.status, "running");
    const after = await readCounter(id);
    assert.ok(after >= before && after < before + 200, `the counter went from ${before} to ${after}`);
    await eventually("the counter goes on", 10_000, async () =>
      (await readCounter(id)) > after ? true : undefined,
    );
    assert.equal(await api.sh(id, "sha256sum /home/user/random.bin | cut -d' ' -f1"), sha256(content));
  });

  test("gives snapshots whose children run on, and differ in all that must differ", async () => {
    const { id } = await api.create();
    await startCounter(id);
    const atSnapshot = await readCounter(id);
    const name = `snap-${id.slice(2, 10)}`;
    const snapshot = await api.must<{ name: string; size_bytes: number }>(201, "POST", "/v1/snapshots", {
      sandbox_id: id,
      name,
    });
    assert.equal(snapshot.name, name);
    assert.ok(snapshot.size_bytes > 0);
    assert.equal((await api.get(id)).status, "running");
    assert.equal((await api.call("POST", "/v1/snapshots", { sandbox_id: id, name })).status, 409);

    const children = await Promise.all([api.create({ template: name }), api.create({ template: name })]);
    const facts = await Promise.all(
      [id, ...children.map((child) => child.id)].map(async (each) => ({
        counter: await readCounter(each),
        uuid: await api.sh(each, "cat /proc/sys/kernel/random/uuid"),
        hostname: await api.sh(each, "hostname"),
        machineId: await api.sh(each, "cat /etc/machine-id"),
        urandom: await api.sh(each, "python3 -c 'import os;print(os.urandom(16))'"),
      })),
    );
    for (const fact of facts) assert.ok(fact.counter >= atSnapshot);
    for (const what of ["uuid", "hostname", "machineId", "urandom"] as const) {
      assert.equal(new Set(facts.map((fact) => fact[what])).size, facts.length, `${what} is not unique`);
    }
    for (const child of children) {
      const seen = await readCounter(child.id);
      await eventually("a child's counter goes on", 10_000, async () =>
        (await readCounter(child.id)) > seen ? true : undefined,
      );
    }
    await api.must(204, "DELETE", `/v1/snapshots/${name}`);
    await api.sh(children[0].id, "echo still here");
  });

  test("leaves nothing on the host when it is destroyed, whatever it did before", async () => {
    const before = await poolAtRest();
    const first = await api.create();
    const second = await api.create();
    await api.pause(first.id);
    const name = `gone-${first.id.slice(2, 10)}`;
    await api.must(201, "POST", "/v1/snapshots", { sandbox_id: second.id, name });
    const child = await api.create({ template: name });
    await Promise.all([first, second, child].map((sandbox) => api.destroy(sandbox.id)));
    await api.must(204, "DELETE", `/v1/snapshots/${name}`);
    for (const sandbox of [first, second, child]) {
      assert.equal((await api.get(sandbox.id)).status, "stopped");
      await api.destroy(sandbox.id);
    }
    assert.deepEqual(await poolAtRest(), before);
  });
});

/** Sizes of all that the agent owns, once the pool is full again and nothing changes any more. */
async function poolAtRest(): Promise<ReturnType<typeof sizes>> {
  let last = "";
  let same = 0;
  return eventually("the host is at rest", 60_000, () => {
    const now = sizes(takeInventory(product.agentDataDir));
    same = JSON.stringify(now) === last ? same + 1 : 0;
    last = JSON.stringify(now);
    // 50 ms apart: three seconds without a change.
    return same >= 60 ? now : undefined;
  });
}
