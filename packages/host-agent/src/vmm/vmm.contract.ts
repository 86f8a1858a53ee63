/**
 * What every VMM driver must do, whatever it is made of. A driver's own test
 * calls `vmmContract` with a bed to test it in.
 *
 * One guest is booted and becomes a base; each test clones that.
 */
import assert from "node:assert/strict";
import { join } from "node:path";
import { RookeryError, type ErrorCode } from "@rookery/protocol/errors";
import { afterAll, afterEach, beforeAll, describe, test } from "vitest";
import type { DiskAttachment, DiskLayer, RootDiskDriver } from "../root-disk/root-disk.ts";
import { patience, TestSandboxes } from "./testing/test-sandboxes.ts";
import type { BootFiles, MemoryLayer, Vm, VmmDriver, VmPlace, VmShape } from "./vmm.ts";

export interface VmmTestBed extends AsyncDisposable {
  /** The driver of the present agent. */
  readonly vmm: VmmDriver;
  readonly rootDisk: RootDiskDriver;
  readonly shape: VmShape;
  readonly boot: BootFiles;
  /** What the guest's disk stands on. */
  readonly image: { chain: readonly DiskLayer[]; sizeBytes: number };
  /** For disks, bases and layers. */
  readonly dir: string;
  makePlace(): Promise<VmPlace>;
  /** After its VM has ended. */
  removePlace(place: VmPlace): Promise<void>;
  /** Closes the driver and opens another, as a restarted agent does; VMs go on. */
  restartDriver(): Promise<VmmDriver>;
  /** Ends the VMM's process as the kernel's OOM killer would. */
  killFromOutside(vm: Vm): Promise<void>;
  /** Changes one byte of a layer's pages. */
  damage(layer: MemoryLayer): Promise<void>;
  readonly guest: {
    /** Waits until the guest of a VM that was just booted or thawed answers. */
    ready(vm: Vm): Promise<void>;
    /** Keeps a text in the guest's memory, not on its disk. */
    remember(vm: Vm, text: string): Promise<void>;
    recall(vm: Vm): Promise<string>;
    /** A number that a process in the guest raises for as long as it runs; it is started when need be. */
    ticks(vm: Vm): Promise<number>;
    /** A kernel panic. Returns at once. */
    crash(vm: Vm): Promise<void>;
    shutDown(vm: Vm): Promise<void>;
  };
}

async function rejectsWith(code: ErrorCode, action: () => Promise<unknown>): Promise<void> {
  await assert.rejects(action, (cause: unknown) => {
    assert.ok(cause instanceof RookeryError, `expected a RookeryError, got ${String(cause)}`);
    assert.equal(cause.code, code, cause.message);
    return true;
  });
}

export function vmmContract(name: string, openBed: () => Promise<VmmTestBed>): void {
  describe(`${name} keeps the VMM contract`, () => {
    let bed: VmmTestBed;
    let sandboxes: TestSandboxes;
    const place = async (): Promise<{ place: VmPlace; disk: DiskAttachment }> => {
      const made = await bed.makePlace();
      const disk = await bed.rootDisk.attach(await sandboxes.newDisk(), made, patience());
      return { place: made, disk };
    };

    beforeAll(async () => {
      bed = await openBed();
      sandboxes = await TestSandboxes.open(bed);
    });
    afterEach(async () => {
      await sandboxes.clear();
    });
    afterAll(async () => {
      await bed[Symbol.asyncDispose]();
    });

    test("a clone goes on where its template was frozen", async () => {
      const { vm } = await sandboxes.spawn();
      assert.equal(vm.state, "waiting");
      await vm.thaw({}, patience());
      assert.equal(vm.state, "running");
      await bed.guest.ready(vm);
      assert.equal(await bed.guest.recall(vm), "template");
    });

    test("what one clone does, no other sees", async () => {
      const one = await sandboxes.start();
      const other = await sandboxes.start();
      await bed.guest.remember(one.vm, "one");
      assert.equal(await bed.guest.recall(other.vm), "template");
      assert.equal(await bed.guest.recall(one.vm), "one");
    });

    test("stopping twice is stopping once", async () => {
      const { vm } = await sandboxes.start();
      await Promise.all([vm.kill(), vm.kill()]);
      await vm.kill();
      assert.equal(vm.state, "exited");
      assert.equal((await vm.exited).reason, "killed");
    });

    test("a clone that waits can be ended", async () => {
      const { vm } = await sandboxes.spawn();
      await vm.kill();
      assert.equal((await vm.exited).reason, "killed");
    });

    test("a frozen guest stands still, and goes on when it is let", async () => {
      const { vm } = await sandboxes.start();
      const before = await bed.guest.ticks(vm);
      await vm.freeze(patience());
      assert.equal(vm.state, "frozen");
      await vm.ping(patience());
      await vm.unfreeze(patience());
      assert.equal(vm.state, "running");
      assert.ok((await bed.guest.ticks(vm)) >= before);
    });

    test("a layer brings memory and processes back into another VMM", async () => {
      const first = await sandboxes.start();
      await bed.guest.remember(first.vm, "before the pause");
      const before = await bed.guest.ticks(first.vm);
      const paused = await sandboxes.pause(first);
      assert.ok(paused.layer.pageBytes > 0);
      assert.ok(paused.layer.allocatedBytes >= paused.layer.pageBytes);
      const second = await sandboxes.resume(paused);
      assert.equal(await bed.guest.recall(second.vm), "before the pause");
      assert.ok((await bed.guest.ticks(second.vm)) >= before);
    });

    test("a layer of a resumed guest is whole again by itself", async () => {
      const first = await sandboxes.start();
      await bed.guest.remember(first.vm, "kept through both");
      const second = await sandboxes.resume(await sandboxes.pause(first));
      const paused = await sandboxes.pause(second);
      const third = await sandboxes.resume(paused);
      assert.equal(await bed.guest.recall(third.vm), "kept through both");
    });

    test("a guest goes on after its layer was taken, and the layer is of that moment", async () => {
      const { vm, disk } = await sandboxes.start();
      await bed.guest.remember(vm, "at the fork");
      const { next } = await bed.rootDisk.prepareNextTop(disk, vm.place, patience());
      await vm.freeze(patience());
      const capture = await vm.captureLayer(patience());
      await vm.switchDiskTop(next, patience());
      // An agent that died on its next line repeats it.
      await vm.switchDiskTop(next, patience());
      await vm.unfreeze(patience());
      await bed.guest.remember(vm, "after the fork");
      const layer = await capture.writeTo(join(bed.dir, "fork-layer"), patience());
      const layersDir = join(bed.dir, "layers");
      const { chain } = await bed.rootDisk.commitNextTop(
        disk,
        { layerId: sandboxes.newLayerId(), layersDir },
        patience(),
      );

      const child = await sandboxes.resume({ layer, disk: await sandboxes.newDisk(chain) });
      assert.equal(await bed.guest.recall(child.vm), "at the fork");
      assert.equal(await bed.guest.recall(vm), "after the fork");
    });

    test("a damaged layer is refused, and nothing of it runs", async () => {
      const paused = await sandboxes.pause(await sandboxes.start());
      await bed.damage(paused.layer);
      const { vm } = await sandboxes.spawn();
      await rejectsWith("host_error", () => vm.thaw({ layer: paused.layer }, patience()));
      assert.notEqual(vm.state, "running");
    });

    test("a base of another VMM or CPU is refused", async () => {
      const given = await place();
      const base = { ...sandboxes.base, fingerprint: "another" };
      await rejectsWith("host_error", () => bed.vmm.spawnClone({ ...given, base }, patience()));
      await bed.removePlace(given.place);
    });

    test("a base whose files are not the promised ones is refused", async () => {
      const given = await place();
      const base = { ...sandboxes.base, memorySha256: "0".repeat(64) };
      await rejectsWith("host_error", () => bed.vmm.spawnClone({ ...given, base }, patience()));
      await bed.removePlace(given.place);
    });

    test("a clone is thawed once, also when that failed", async () => {
      const { vm } = await sandboxes.start();
      await rejectsWith("wrong_state", () => vm.thaw({}, patience()));
      const missing = { dir: join(bed.dir, "no-such-layer"), pageBytes: 0, allocatedBytes: 0 };
      const { vm: failed } = await sandboxes.spawn();
      await rejectsWith("host_error", () => failed.thaw({ layer: missing }, patience()));
      await rejectsWith("wrong_state", () => failed.thaw({}, patience()));
    });

    test("what a state does not allow is refused and changes nothing", async () => {
      const { vm } = await sandboxes.start();
      await rejectsWith("wrong_state", () => vm.captureLayer(patience()));
      await rejectsWith("wrong_state", () => vm.unfreeze(patience()));
      await rejectsWith("wrong_state", () => vm.saveBase(join(bed.dir, "no-base"), patience()));
      await vm.freeze(patience());
      await rejectsWith("wrong_state", () => vm.freeze(patience()));
      await rejectsWith("wrong_state", () => vm.saveBase(join(bed.dir, "no-base"), patience()));
      await vm.unfreeze(patience());
      assert.equal(await bed.guest.recall(vm), "template");
    });

    test("an operation that was called off beforehand does nothing", async () => {
      const { vm } = await sandboxes.start();
      await assert.rejects(vm.freeze(AbortSignal.abort()));
      assert.equal(vm.state, "running");
      assert.equal(await bed.guest.recall(vm), "template");
    });

    test("a VMM that dies is noticed, and answers no ping", async () => {
      const { vm } = await sandboxes.start();
      await bed.killFromOutside(vm);
      assert.equal((await vm.exited).reason, "vmm_exited");
      assert.equal(vm.state, "exited");
      await assert.rejects(vm.ping(patience()));
      await vm.kill();
    });

    test("a guest whose kernel crashes is noticed, with its last words", async () => {
      const { vm } = await sandboxes.start();
      await bed.guest.crash(vm);
      const exit = await vm.exited;
      assert.equal(exit.reason, "guest_crashed");
      assert.match(exit.message, /panic/i);
    });

    test("a guest that shuts down is noticed", async () => {
      const { vm } = await sandboxes.start();
      await bed.guest.shutDown(vm);
      assert.equal((await vm.exited).reason, "guest_shutdown");
    });

    test("a restarted agent finds a running VM, a frozen one, and can go on with both", async () => {
      const running = await sandboxes.start();
      const frozen = await sandboxes.start();
      await bed.guest.remember(running.vm, "survived");
      await frozen.vm.freeze(patience());

      const driver = await bed.restartDriver();
      const journaled = (vm: Vm): Vm["record"] => JSON.parse(JSON.stringify(vm.record));
      const found = await driver.adopt(running.vm.place, journaled(running.vm), patience());
      assert.ok(found);
      assert.equal(found.state, "running");
      assert.equal(await bed.guest.recall(found), "survived");
      await found.freeze(patience());
      const capture = await found.captureLayer(patience());
      await capture.writeTo(join(bed.dir, "adopted-layer"), patience());
      await found.kill();
      assert.equal((await found.exited).reason, "killed");

      const still = await driver.adopt(frozen.vm.place, journaled(frozen.vm), patience());
      assert.equal(still?.state, "frozen");
      await still?.unfreeze(patience());
      assert.equal(still?.state, "running");
      await still?.kill();
    });

    test("a restarted agent notices the end of a VM that it adopted", async () => {
      const { vm } = await sandboxes.start();
      const driver = await bed.restartDriver();
      const found = await driver.adopt(vm.place, vm.record, patience());
      assert.ok(found);
      await bed.killFromOutside(vm);
      assert.equal((await found.exited).reason, "vmm_exited");
    });

    test("a record of a process that is gone, or of another one, adopts nothing", async () => {
      const { vm } = await sandboxes.start();
      const driver = await bed.restartDriver();
      const recycled = { ...vm.record, startTime: "1" };
      assert.equal(await driver.adopt(vm.place, recycled, patience()), undefined);
      await vm.kill();
      assert.equal(await driver.adopt(vm.place, vm.record, patience()), undefined);
    });
  });
}
