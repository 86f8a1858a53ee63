/** Warm images of a real guest. */
import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import { readdir, readFile, stat } from "node:fs/promises";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, describe, test } from "vitest";
import { EnvdClient } from "../guest/envd-client.ts";
import type { GuestImage } from "../image/guest-image.ts";
import { guestForTests } from "../vmm/testing/guest-image.ts";
import { openQemuTestBed, type QemuTestBed } from "../vmm/testing/qemu-test-bed.ts";
import type { Vm } from "../vmm/vmm.ts";
import type { WarmKey } from "../ids.ts";
import type { WarmProgress } from "./build-warm-image.ts";
import { WarmImageStore } from "./warm-image-store.ts";

const image = await guestForTests();
/** Under TCG most of it is translated code: what envd and the guest's kernel run through up to the end of /init. */
const MOST_ANONYMOUS_KB = 40 << 10;
const SHAPE = { vcpus: 1, memoryMb: 512 };

describe("warm images", () => {
  let bed: QemuTestBed;
  const guest = new EnvdClient();
  const inUse = new Set<WarmKey>();
  const progress: WarmProgress[] = [];
  const vms: Vm[] = [];
  let booted = 0;
  let nowMs = Date.now();

  const openStore = (budgetBytes = 1e12): Promise<WarmImageStore> =>
    WarmImageStore.open({
      dataDir: bed.dir,
      images: { ensure: async () => guestImage() },
      network: {
        kind: "user",
        addressing: { addressCidr: "10.0.2.15/24", gateway: "10.0.2.2", nameservers: [] },
      },
      vmm: bed.vmm,
      rootDisk: bed.rootDisk,
      guest,
      nowMs: () => nowMs,
      randomBytes: (count) => randomBytes(count),
      budgetBytes,
      inUse: () => inUse,
      onProgress: (event) => progress.push(event),
      places: {
        async make() {
          booted += 1;
          const vm = await bed.makePlace();
          const port = vm.nic.kind === "user" ? vm.nic.forwards[0]?.hostPort : undefined;
          assert.ok(port);
          return {
            vm,
            envd: { host: "127.0.0.1", port },
            record: async () => undefined,
            release: () => bed.removePlace(vm),
          };
        },
      },
    });
  const guestImage = (): GuestImage => {
    const [disk] = bed.image.chain;
    assert.ok(disk);
    return {
      name: "base",
      hash: image.hash,
      dir: bed.dir,
      kernel: image.boot.kernel,
      initrd: image.boot.initrd,
      cmdline: image.boot.cmdline,
      rootDisk: { path: disk.path, format: "raw", sizeBytes: bed.image.sizeBytes },
      createdAt: new Date(0),
    };
  };

  beforeAll(async () => {
    bed = await openQemuTestBed(image);
  });
  afterEach(async () => {
    for (const vm of vms.splice(0)) {
      await vm.kill();
      await bed.removePlace(vm.place);
    }
  });
  afterAll(async () => {
    await guest.close();
    await bed[Symbol.asyncDispose]();
  });

  test("one is built once for all who ask, and clones of it answer", async () => {
    const store = await openStore();
    const asked = await Promise.all(
      [1, 2, 3].map(() => store.ensure("base", SHAPE, AbortSignal.timeout(290_000))),
    );
    const [warm] = asked;
    assert.ok(warm);
    assert.ok(asked.every((each) => each.key === warm.key));
    assert.equal(booted, 1);
    assert.deepEqual(
      progress.map((event) => event.step),
      ["boot", "prime", "save", "ready"],
    );

    const place = await bed.makePlace();
    const disk = await bed.rootDisk.create(
      { dir: join(bed.dir, "clone"), chain: warm.diskChain, sizeBytes: warm.diskSizeBytes },
      AbortSignal.timeout(10_000),
    );
    const attachment = await bed.rootDisk.attach(disk, place, AbortSignal.timeout(10_000));
    const vm = await bed.vmm.spawnClone(
      { place, base: warm.base, disk: attachment },
      AbortSignal.timeout(30_000),
    );
    vms.push(vm);
    await vm.thaw({}, AbortSignal.timeout(30_000));
    await bed.guest.ready(vm);
    const rollup = await readFile(`/proc/${vm.record.pid}/smaps_rollup`, "utf8");
    const anonymousKb = Number(/^Anonymous:\s+(\d+) kB$/m.exec(rollup)?.[1]);
    assert.ok(anonymousKb < MOST_ANONYMOUS_KB, `its VMM holds ${anonymousKb} kB of anonymous memory`);
    assert.equal((await bed.exec(vm, "hostname")).trim(), "test");
    assert.equal((await bed.exec(vm, "ls -A /tmp")).trim(), "");
    const { blocks } = await stat(join(bed.dir, "clone/top-2/disk.qcow2"));
    assert.ok(blocks * 512 < 1 << 20, `a clone holds ${blocks * 512} bytes of disk`);
  }, 300_000);

  test("the next agent finds it, and nothing is built again", async () => {
    const before = booted;
    const store = await openStore();
    const warm = await store.ensure("base", SHAPE, AbortSignal.timeout(10_000));
    assert.equal(booted, before);
    assert.equal((await store.open(warm.key, AbortSignal.timeout(10_000)))?.key, warm.key);
  });

  test("what is in use is kept beyond the budget; what is not goes when its grace is over", async () => {
    const store = await openStore(0);
    const warm = await store.ensure("base", SHAPE, AbortSignal.timeout(10_000));
    assert.deepEqual(await store.evict(), []);
    nowMs += 3_600_000;
    inUse.add(warm.key);
    assert.deepEqual(await store.evict(), []);
    inUse.clear();
    assert.deepEqual(await store.evict(), [warm.key]);
    assert.equal(await store.open(warm.key, AbortSignal.timeout(10_000)), undefined);
    assert.deepEqual(await readdir(join(bed.dir, "warm")), []);
  });

  test("a shape that no VMM has is refused before anything is booted", async () => {
    const before = booted;
    const store = await openStore();
    await assert.rejects(store.ensure("base", { vcpus: 0, memoryMb: 512 }, AbortSignal.timeout(1_000)), {
      code: "unsupported_shape",
    });
    assert.equal(booted, before);
  });
});
