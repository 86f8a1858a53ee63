/** Sandboxes in a test's bed: one template, clones of it, pauses and resumes, by the seams alone. */
import { join } from "node:path";
import type { LayerId } from "../../ids.ts";
import type { DiskLayer, RootDisk } from "../../root-disk/root-disk.ts";
import type { VmmTestBed } from "../vmm.contract.ts";
import type { MemoryBase, MemoryLayer, Vm } from "../vmm.ts";

export interface TestSandbox {
  vm: Vm;
  disk: RootDisk;
}

export interface PausedTestSandbox {
  layer: MemoryLayer;
  disk: RootDisk;
}

/** Anything here that takes longer has hung. */
const PATIENCE_MS = 60_000;

export function patience(): AbortSignal {
  return AbortSignal.timeout(PATIENCE_MS);
}

export class TestSandboxes {
  readonly bed: VmmTestBed;
  readonly base: MemoryBase;
  readonly warmChain: readonly DiskLayer[];
  readonly #live = new Set<Vm>();
  #lastId = 0;

  private constructor(bed: VmmTestBed, base: MemoryBase, warmChain: readonly DiskLayer[]) {
    this.bed = bed;
    this.base = base;
    this.warmChain = warmChain;
  }

  /** Boots the template, which remembers "template", and freezes it for good. `prime` runs in it before. */
  static async open(bed: VmmTestBed, prime?: (vm: Vm) => Promise<void>): Promise<TestSandboxes> {
    const place = await bed.makePlace();
    const disk = await bed.rootDisk.create({ dir: join(bed.dir, "template"), ...bed.image }, patience());
    const attachment = await bed.rootDisk.attach(disk, place, patience());
    const { shape, boot } = bed;
    const vm = await bed.vmm.boot({ place, shape, boot, disk: attachment }, patience());
    let base: MemoryBase;
    try {
      await bed.guest.ready(vm);
      await bed.guest.remember(vm, "template");
      await prime?.(vm);
      await vm.freeze(patience());
      base = await vm.saveBase(join(bed.dir, "base"), patience());
    } finally {
      await vm.kill();
    }
    await bed.rootDisk.detach(disk, place, patience());
    await bed.rootDisk.prepareNextTop(disk, undefined, patience());
    const commit = { layerId: "lytemplate00000000" as LayerId, layersDir: join(bed.dir, "layers") };
    const { chain } = await bed.rootDisk.commitNextTop(disk, commit, patience());
    await bed.removePlace(place);
    return new TestSandboxes(bed, base, chain);
  }

  /** A path or name that no other call gave. */
  unique(prefix: string): string {
    this.#lastId += 1;
    return `${prefix}-${this.#lastId}`;
  }

  newLayerId(): LayerId {
    this.#lastId += 1;
    // Of the form of a LayerId, and unique in this bed.
    return `ly${`${this.#lastId}`.padStart(16, "0")}` as LayerId;
  }

  newDisk(chain: readonly DiskLayer[] = this.warmChain): Promise<RootDisk> {
    const { sizeBytes } = this.bed.image;
    return this.bed.rootDisk.create(
      { dir: join(this.bed.dir, this.unique("disk")), chain, sizeBytes },
      patience(),
    );
  }

  /** A clone that waits. */
  async spawn(): Promise<TestSandbox> {
    const place = await this.bed.makePlace();
    const disk = await this.newDisk();
    const attachment = await this.bed.rootDisk.attach(disk, place, patience());
    const vm = await this.bed.vmm.spawnClone({ place, base: this.base, disk: attachment }, patience());
    this.#live.add(vm);
    return { vm, disk };
  }

  async start(): Promise<TestSandbox> {
    const sandbox = await this.spawn();
    await sandbox.vm.thaw({}, patience());
    await this.bed.guest.ready(sandbox.vm);
    return sandbox;
  }

  async pause({ vm, disk }: TestSandbox): Promise<PausedTestSandbox> {
    await vm.freeze(patience());
    const capture = await vm.captureLayer(patience());
    const layer = await capture.writeTo(join(this.bed.dir, this.unique("layer")), patience());
    await vm.kill();
    await this.bed.rootDisk.detach(disk, vm.place, patience());
    return { layer, disk };
  }

  async resume(paused: PausedTestSandbox): Promise<TestSandbox> {
    const { vm } = await this.spawn();
    const attachment = await this.bed.rootDisk.attach(paused.disk, vm.place, patience());
    await vm.thaw({ disk: attachment, layer: paused.layer }, patience());
    await this.bed.guest.ready(vm);
    return { vm, disk: paused.disk };
  }

  /** Ends what lives, but for `spared`. */
  async clear(spared?: Vm): Promise<void> {
    for (const vm of this.#live) {
      if (vm === spared) continue;
      await vm.kill();
      await this.bed.removePlace(vm.place);
      this.#live.delete(vm);
    }
  }
}
