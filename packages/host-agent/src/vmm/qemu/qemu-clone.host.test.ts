/** What a clone of the `qemu` driver is made of on the host: its confinement, its size, its disk. */
import assert from "node:assert/strict";
import { readdir, readFile, readlink, stat } from "node:fs/promises";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, describe, test } from "vitest";
import { guestForTests } from "../testing/guest-image.ts";
import { openQemuTestBed, type QemuTestBed } from "../testing/qemu-test-bed.ts";
import { patience, TestSandboxes } from "../testing/test-sandboxes.ts";
import type { Vm } from "../vmm.ts";

const image = await guestForTests();
const MIB = 1 << 20;

async function statusOf(pid: number): Promise<Map<string, string>> {
  const text = await readFile(`/proc/${pid}/status`, "utf8");
  return new Map(
    text.split("\n").map((line) => [line.split(":")[0] ?? "", line.split(":\t")[1]?.trim() ?? ""]),
  );
}

describe("a clone of the qemu driver", () => {
  let bed: QemuTestBed;
  let sandboxes: TestSandboxes;
  beforeAll(async () => {
    bed = await openQemuTestBed(image);
    sandboxes = await TestSandboxes.open(bed, async (vm: Vm) => {
      // As warm as it takes for a first command.
      for (let round = 0; round < 3; round += 1) await bed.exec(vm, "true");
      await bed.exec(vm, "sync");
    });
  });
  afterEach(async () => {
    await sandboxes.clear();
  });
  afterAll(async () => {
    await bed[Symbol.asyncDispose]();
  });

  test.skipIf(process.getuid?.() !== 0)(
    "is confined: no privilege, no file and no process but its own",
    async () => {
      const { vm } = await sandboxes.spawn();
      const { pid } = vm.record;
      const status = await statusOf(pid);
      const { uid } = vm.place;
      assert.notEqual(uid, 0);
      assert.equal(status.get("Uid"), [uid, uid, uid, uid].join("\t"));
      assert.equal(status.get("Gid"), [uid, uid, uid, uid].join("\t"));
      assert.equal(status.get("Groups"), "");
      for (const set of ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"]) {
        assert.equal(status.get(set), "0000000000000000", set);
      }
      assert.equal(status.get("NoNewPrivs"), "1");
      assert.equal(status.get("Seccomp"), "2");

      const root = `/proc/${pid}/root`;
      const names = new Set(await readdir(root));
      for (const name of ["lib", "lib64"]) names.delete(name);
      assert.deepEqual([...names].toSorted(), ["dev", "etc", "old", "proc", "usr", "vm"]);
      assert.deepEqual(await readdir(join(root, "old")), []);
      assert.deepEqual(
        (await readdir(join(root, "vm"))).toSorted(),
        (await readdir(vm.place.runDir)).toSorted(),
      );
      const mounts = (await readFile(`/proc/${pid}/mountinfo`, "utf8")).trim().split("\n");
      const points = new Set(mounts.map((line) => line.split(" ")[4]));
      for (const point of points) {
        assert.match(`${point}`, /^\/(usr|proc|vm|lib|lib64)?$/, "nothing else of the host is mounted");
      }
      assert.match(mounts.find((line) => line.split(" ")[4] === "/proc") ?? "", /hidepid=invisible/);
      for (const space of ["mnt", "ipc", "uts"]) {
        assert.notEqual(await readlink(`/proc/${pid}/ns/${space}`), await readlink(`/proc/self/ns/${space}`));
      }
    },
  );

  test("costs less than 1 MiB of disk", async () => {
    const { vm, disk } = await sandboxes.start();
    await bed.exec(vm, "sync");
    const used = await bed.rootDisk.allocatedBytes(disk);
    assert.ok(used < MIB, `${used} bytes of disk`);
  });

  test("that dirtied 10 MiB leaves less than 20 MiB behind, and no more after a second pause", async () => {
    const first = await sandboxes.start();
    await bed.exec(first.vm, "head -c 10485760 /dev/urandom > /dev/shm/x");
    const paused = await sandboxes.pause(first);
    const { allocatedBytes } = paused.layer;
    assert.ok(allocatedBytes > 10 * MIB && allocatedBytes < 20 * MIB, `${allocatedBytes} bytes`);
    // What guests free is empty again: init_on_free.
    const second = await sandboxes.resume(paused);
    await bed.exec(second.vm, "rm /dev/shm/x; head -c 10485760 /dev/urandom > /dev/shm/y");
    const again = await sandboxes.pause(second);
    assert.ok(again.layer.allocatedBytes < 22 * MIB, `${again.layer.allocatedBytes} bytes`);
  });

  test("changes to the disk that it is given at thaw, enlarged, and lets go of its first one", async () => {
    const { vm } = await sandboxes.spawn();
    const disk = await sandboxes.newDisk();
    const before = await readdir(`/proc/${vm.record.pid}/fd`);
    const attachment = await bed.rootDisk.attach(disk, vm.place, patience());
    const sizeBytes = bed.image.sizeBytes + 512 * MIB;
    await vm.thaw({ disk: attachment, growDiskToBytes: sizeBytes }, patience());
    await bed.guest.ready(vm);
    assert.equal(Number(await bed.exec(vm, "cat /sys/block/vda/size")) * 512, sizeBytes);
    await bed.exec(vm, "head -c 3000000 /dev/urandom > /root/x; sync");
    assert.ok((await bed.rootDisk.allocatedBytes(disk)) > 3_000_000);

    const open = await Promise.all(
      (await readdir(`/proc/${vm.record.pid}/fd`)).map((fd) => readlink(`/proc/${vm.record.pid}/fd/${fd}`)),
    );
    const tops = open.filter((path) => path.startsWith("/vm/") || path.startsWith(vm.place.runDir));
    const inodes = await Promise.all(
      tops.map(async (path) => (await stat(join(vm.place.runDir, path.split("/").at(-1) ?? ""))).ino),
    );
    assert.equal(new Set(inodes).size, attachment.kind === "file-chain" ? attachment.nodes.length : 1);
    assert.ok(open.length <= before.length + 4);
  });
});
