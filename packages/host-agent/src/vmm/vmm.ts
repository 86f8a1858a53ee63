/**
 * The seam to virtual machine monitors.
 *
 * A VMM lives in a *place*: a uid, a run directory, a socket directory, cgroups
 * and a network card, all made (and undone) by the vm-pool, never by the driver.
 * A VM is spawned either cold (to make a warm image) or as a waiting clone of a
 * warm image, which `thaw` brings to life with a disk and, optionally, a memory
 * layer. Its process outlives the agent; `adopt` finds it again by its record.
 *
 * Callers never ask which driver they hold; they read a capability.
 */
import type { GuestNic } from "../guest-network/guest-network.ts";
import type { VmId } from "../ids.ts";
import type { DiskAttachment } from "../root-disk/root-disk.ts";

export type VmmKind = "qemu" | "firecracker" | "simulated";

export interface VmShape {
  vcpus: number;
  memoryMb: number;
}

/** All that a VMM may touch on this host. */
export interface VmPlace {
  vmId: VmId;
  /** uid and gid of the VMM's process; 0 only where the agent is not root. */
  uid: number;
  /** The only directory that it can write; same file system as the disks. */
  runDir: string;
  /** Short (socket paths end at 107 bytes); holds the VMM's control sockets. */
  socketDir: string;
  /** Console and VMM log go here, outside of the VMM's reach. */
  logDir: string;
  /** `cgroup.procs` files that the process joins before it starts. */
  cgroupProcs: readonly string[];
  nic: GuestNic;
}

/** Files of a guest image (see image/): absolute paths on the host. */
export interface BootFiles {
  kernel: string;
  initrd: string;
  /** Kernel arguments of the image; drivers add their own (console, TSC). */
  cmdline: string;
}

/** A warm image's VMM part: a directory of immutable files, listed in its manifest. */
export interface MemoryBase {
  dir: string;
  shape: VmShape;
  /** SHA-256 of memory base and device state. */
  memorySha256: string;
  deviceStateSha256: string;
  /** `fingerprint()` of the driver that made it. */
  fingerprint: string;
}

/** A memory layer on disk: the whole difference of one frozen VM from its MemoryBase. */
export interface MemoryLayer {
  dir: string;
  /** Bytes of pages in it. */
  pageBytes: number;
  allocatedBytes: number;
}

/** Pages and device state of a frozen VM, copied out of it; `writeTo` may run after the guest goes on. */
export interface LayerCapture {
  pageBytes: number;
  /** Writes pages, index, device state and, last, the manifest (fsync, rename) below `dir`. */
  writeTo(dir: string, signal: AbortSignal): Promise<MemoryLayer>;
}

/** JSON-serialisable: what the journal keeps of a live VM. */
export interface VmRecord {
  kind: VmmKind;
  vmId: VmId;
  pid: number;
  /** Field 22 of /proc/PID/stat: with the pid, it names one process for good. */
  startTime: string;
  /** Driver's own facts. */
  driver: Record<string, unknown>;
}

export type VmExit = {
  /** "killed": by us. "guest_shutdown", "guest_crashed": by the guest. "vmm_exited": the process died. "hung": it stopped answering. */
  reason: "killed" | "guest_shutdown" | "guest_crashed" | "vmm_exited" | "hung";
  /** Words for people, with the last lines of console or VMM log where they help. */
  message: string;
};

export type VmState = "booting" | "waiting" | "running" | "frozen" | "exited";

export interface Vm {
  readonly place: VmPlace;
  readonly record: VmRecord;
  readonly state: VmState;
  /** Resolves once, when the VM has ended for whatever reason. Never rejects. */
  readonly exited: Promise<VmExit>;

  /**
   * Waiting clone → running guest. `disk` replaces the one given at spawn, when
   * given; `growDiskToBytes` enlarges the block device; `layer` is loaded and
   * its manifest verified before anything of it is used. When it fails before the
   * guest ran, the state is still "waiting", or "exited".
   */
  thaw(
    options: { disk?: DiskAttachment; growDiskToBytes?: number; layer?: MemoryLayer },
    signal: AbortSignal,
  ): Promise<void>;
  /** Stops the guest; its disk is drained and flushed. */
  freeze(signal: AbortSignal): Promise<void>;
  /** Lets a frozen guest go on. */
  unfreeze(signal: AbortSignal): Promise<void>;
  /** Only when frozen. */
  captureLayer(signal: AbortSignal): Promise<LayerCapture>;
  /**
   * Only when frozen: the disk's present top becomes read-only below `next`. Does
   * nothing when the VM already writes to `next`: after a crash of the agent nobody
   * else knows whether it does, so recovery asks for it again.
   */
  switchDiskTop(next: DiskAttachment, signal: AbortSignal): Promise<void>;
  /** Only a cold-booted, frozen VM: its memory and device state become a MemoryBase in `dir`. */
  saveBase(dir: string, signal: AbortSignal): Promise<MemoryBase>;
  /** Answers while the VMM is healthy; throws a RookeryError `timeout` otherwise. */
  ping(signal: AbortSignal): Promise<void>;
  /** Ends the process and waits until it is gone. Stopping twice is stopping once. */
  kill(): Promise<void>;
}

export interface VmmProbe {
  ok: boolean;
  /** "kvm", "tcg", … by starting a real guest. */
  acceleration?: string;
  version?: string;
  /** Is this a boundary that hostile tenants may be held behind? */
  secure?: boolean;
  /** Why not, or what a user should know. */
  reason?: string;
}

export interface VmmDriver {
  readonly kind: VmmKind;
  readonly canForkRunning: boolean;
  /** Starts a tiny real guest; the verdict is cached per boot of the host. */
  probe(signal: AbortSignal): Promise<VmmProbe>;
  /**
   * Everything of this driver and host that a warm image depends on: version,
   * arguments, CPU, TSC kHz. Compared by `isLoadable` (protocol's memory-compat).
   */
  fingerprint(signal: AbortSignal): Promise<string>;
  /** Boots a guest from its image; used to make warm images. */
  boot(
    options: { place: VmPlace; shape: VmShape; boot: BootFiles; disk: DiskAttachment },
    signal: AbortSignal,
  ): Promise<Vm>;
  /** A process that waits for `thaw`: what the pool holds. Refuses a base of another fingerprint. */
  spawnClone(
    options: { place: VmPlace; base: MemoryBase; disk: DiskAttachment },
    signal: AbortSignal,
  ): Promise<Vm>;
  /** The live VM of a record, or undefined when its process is gone or is another. */
  adopt(place: VmPlace, record: VmRecord, signal: AbortSignal): Promise<Vm | undefined>;
  /** Drops what the driver holds in memory (bases, caches); VMs go on. */
  close(): Promise<void>;
}
