/**
 * Places: what a VMM needs on this host before it starts, made and undone in
 * one order: slot, record, directories, cgroup, network.
 *
 * Invariant: a place's record is in the journal before anything of the place
 * exists, and goes last; its slot is free only when nothing bears its number.
 * A place that could not be undone is kept and tried again.
 */
import { chmod, chown, mkdir } from "node:fs/promises";
import { join } from "node:path";
import { RookeryError } from "@rookery/protocol/errors";
import { removeTree } from "../host/atomic-file.ts";
import type { VmId, WarmKey } from "../ids.ts";
import type { Journal } from "../journal/journal.ts";
import type { VmPlaceRecord } from "../journal/records.ts";
import type { RootDisk } from "../root-disk/root-disk.ts";
import { deadlineSignal } from "../sandbox-manager/clock.ts";
import type { Deps } from "../sandbox-manager/deps.ts";
import { newVmId } from "../sandbox-manager/new-ids.ts";
import type { Vm, VmPlace, VmShape } from "../vmm/vmm.ts";
import { Slots } from "./slots.ts";

export interface Place {
  /** What the VMM driver gets. */
  vm: VmPlace;
  record: VmPlaceRecord;
  /** What its clone was spawned from; undefined for an adopted one. */
  warmKey: WarmKey | undefined;
}

/** What lives in a place, as far as this agent knows. */
export interface Tenant {
  vm?: Vm | undefined;
  /** The disk below the place's own directory. */
  disk?: RootDisk | undefined;
}

/** How many are remembered after they went; who might ask for one again does so within seconds. */
const MAX_GONE = 1 << 16;

export class Places {
  readonly #deps: Deps;
  readonly #journal: Journal;
  readonly slots: Slots;
  /** Places whose undo failed, or is under way: their slots stay taken. */
  readonly #leaving = new Map<
    VmId,
    { record: VmPlaceRecord; tenant: Tenant; underWay: Promise<void> | undefined }
  >();

  /** Places that went: their slots may be others' by now. Oldest first. */
  readonly #gone = new Set<VmId>();

  constructor(deps: Deps, journal: Journal) {
    this.#deps = deps;
    this.#journal = journal;
    this.slots = new Slots(deps.config.maxSlots);
  }

  async make(shape: VmShape, signal: AbortSignal): Promise<Place> {
    const { config, network, cgroups, host } = this.#deps;
    signal.throwIfAborted();
    const vmId = newVmId(this.#deps);
    const slot = this.slots.take();
    const uid = config.uidBase === undefined ? 0 : config.uidBase + slot;
    const dir = this.#journal.vmDir(vmId);
    const record: VmPlaceRecord = {
      version: 1,
      vmId,
      slot,
      uid,
      runDir: join(dir, "run"),
      logDir: join(dir, "log"),
      socketDir: join(config.socketRoot, vmId),
      cgroup: `${config.cgroupPrefix}${vmId}`,
      lease: network.plan(slot, uid),
      bootId: host.bootId,
    };
    try {
      await this.#journal.writeVm(record);
      await mkdir(record.logDir, { recursive: true, mode: 0o700 });
      for (const own of [record.runDir, record.socketDir]) {
        await mkdir(own, { recursive: true });
        if (uid !== 0) await chown(own, uid, uid);
        await chmod(own, 0o700);
      }
      const cgroupProcs = await cgroups.make(record.cgroup, shape, signal);
      await network.up(record.lease, signal);
      return { vm: placeOf(record, cgroupProcs), record, warmKey: undefined };
    } catch (cause) {
      // What the undo cannot do is logged there and tried again; the first error counts.
      await this.release(record, {}).catch(() => undefined);
      throw cause;
    }
  }

  /** Remembers the VMM's process, so that the next agent finds it. */
  async recordProcess(place: Place, vm: Vm): Promise<void> {
    place.record = { ...place.record, process: vm.record };
    await this.#journal.writeVm(place.record);
  }

  /**
   * Ends what lives in the place and takes it away. Bears running twice: once the
   * place is gone, whoever did it, that does nothing. On failure the place is
   * kept, for `retryLeaving`, and the error thrown.
   */
  async release(record: VmPlaceRecord, tenant: Tenant): Promise<void> {
    if (this.#gone.has(record.vmId)) return;
    const underWay = this.#leaving.get(record.vmId)?.underWay;
    if (underWay !== undefined) return await underWay;
    const release = this.#release(record, tenant);
    this.#leaving.set(record.vmId, { record, tenant, underWay: release });
    try {
      await release;
      this.#leaving.delete(record.vmId);
      this.#remember(record.vmId);
      this.slots.free(record.slot);
    } catch (cause) {
      this.#leaving.set(record.vmId, { record, tenant, underWay: undefined });
      this.#deps.logger.error(
        { vmId: record.vmId, slot: record.slot, err: cause },
        "a place could not be taken away: it is tried again",
      );
      throw cause;
    }
  }

  #remember(vmId: VmId): void {
    this.#gone.add(vmId);
    if (this.#gone.size <= MAX_GONE) return;
    for (const oldest of this.#gone) {
      this.#gone.delete(oldest);
      return;
    }
  }

  async #release(record: VmPlaceRecord, { vm, disk }: Tenant): Promise<void> {
    const { config, clock, network, cgroups, rootDisk } = this.#deps;
    using limit = deadlineSignal(
      clock,
      config.undoTimeoutMs,
      () => new RookeryError("timeout", "taking a VM's place away took too long"),
    );
    if (vm === undefined) await this.#killLeftProcess(record, limit.signal);
    else await vm.kill();
    await cgroups.remove(record.cgroup, limit.signal);
    if (disk !== undefined) await rootDisk.detach(disk, record, limit.signal);
    await rootDisk.remove(this.#journal.vmDiskDir(record.vmId));
    // Another driver's lease is of an earlier boot, which ended it: the agent does not start beside a live one.
    if (record.lease.driver === network.kind) await network.down(record.lease, limit.signal);
    await removeTree(record.socketDir);
    await removeTree(this.#journal.vmDir(record.vmId));
  }

  /** Tries again, when the place of this VM could not be taken away before. */
  async releaseLeft(vmId: VmId): Promise<void> {
    const left = this.#leaving.get(vmId);
    if (left !== undefined) await this.release(left.record, left.tenant);
  }

  /** Places still to be taken away; each was tried at least once. */
  leavingIds(): VmId[] {
    return [...this.#leaving.keys()];
  }

  get leavingCount(): number {
    return this.#leaving.size;
  }

  async retryLeaving(): Promise<void> {
    for (const { record, tenant } of this.#leaving.values()) {
      // Logged in `release`; it stays for the next round.
      await this.release(record, tenant).catch(() => undefined);
    }
  }

  /**
   * A process of a former agent, named by pid and start time; or one that never
   * got into a record, named by its uid, or by its run directory where all have one uid. A boot ends both.
   */
  async #killLeftProcess(record: VmPlaceRecord, signal: AbortSignal): Promise<void> {
    const { host, logger, vmm } = this.#deps;
    if (record.bootId !== host.bootId) return;
    if (record.process !== undefined) {
      const { pid, startTime } = record.process;
      const left = await vmm.adopt(placeOf(record, []), record.process, signal).catch((cause: unknown) => {
        // It is to end in any case, and what cannot be talked to can still be killed.
        logger.warn({ vmId: record.vmId, pid, err: cause }, "a left VM is ended without its consent");
        return host.killProcess({ pid, startTime });
      });
      await left?.kill();
    }
    if (record.uid !== 0) await host.killProcessesOf(record.uid);
    else await host.killProcessesIn(record.runDir);
  }
}

export function placeOf(record: VmPlaceRecord, cgroupProcs: readonly string[]): VmPlace {
  return {
    vmId: record.vmId,
    uid: record.uid,
    runDir: record.runDir,
    socketDir: record.socketDir,
    logDir: record.logDir,
    cgroupProcs,
    nic: record.lease.nic,
  };
}
