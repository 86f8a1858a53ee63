/**
 * The cgroup that each VMM sits in, by interface: host/cgroup.ts on a real
 * host, a set of names in a simulated one.
 */
import { listOwnedCgroups, makeCgroup, removeCgroup } from "../host/cgroup.ts";
import type { VmShape } from "../vmm/vmm.ts";

export interface VmCgroups {
  /** Makes the group, or sets the limits of the one that is there. The answer is `VmPlace.cgroupProcs`. */
  make(name: string, shape: VmShape, signal: AbortSignal): Promise<readonly string[]>;
  /** Kills what is in it and removes it. Bears running twice. */
  remove(name: string, signal: AbortSignal): Promise<void>;
  listOwned(prefix: string): Promise<string[]>;
}

/**
 * What a VMM holds besides its guest: process, translation cache (TCG keeps up
 * to a fifth of guest memory here), page tables, and buffers of the disk.
 */
const VMM_OVERHEAD_BYTES = 384 << 20;
/** vCPU, I/O and worker threads; QEMU uses up to 64 workers for a busy disk. */
const VMM_PIDS = 128;
/** Disk and network I/O run beside the vCPUs. */
const VMM_EXTRA_CORES = 1;

export const hostCgroups: VmCgroups = {
  async make(name, shape) {
    const group = await makeCgroup(name, {
      // Twice the guest: private pages, and pages of the base that this VM touched first.
      memoryBytes: 2 * shape.memoryMb * (1 << 20) + VMM_OVERHEAD_BYTES,
      pids: VMM_PIDS,
      cpuWeight: 100 * shape.vcpus,
      cpuQuotaCores: shape.vcpus + VMM_EXTRA_CORES,
    });
    return group.procs;
  },
  remove: (name, signal) => removeCgroup(name, signal),
  listOwned: (prefix) => listOwnedCgroups(prefix),
};

/** For an agent that may not make cgroups; `doctor` says what is missing. */
export const noCgroups: VmCgroups = {
  make: () => Promise.resolve([]),
  remove: () => Promise.resolve(),
  listOwned: () => Promise.resolve([]),
};
