/**
 * Recovery at start: the journal against the host.
 *
 * Each sandbox is settled (settle.ts); VMs that no sandbox claims end; whatever
 * on the host bears our mark and belongs to no record goes. A sandbox that
 * cannot be settled does not keep the others, or the agent, from starting.
 */
import { readdir } from "node:fs/promises";
import { join } from "node:path";
import { RookeryError } from "@rookery/protocol/errors";
import pLimit from "p-limit";
import { removeTree } from "../host/atomic-file.ts";
import { isErrno } from "../host/errno.ts";
import type { SandboxRecord, VmPlaceRecord } from "../journal/records.ts";
import { SandboxEntry, undoLimit, type Core } from "./core.ts";
import { settle } from "./settle.ts";

const AT_ONCE = 8;

export async function recover(core: Core): Promise<void> {
  const { logger, clock } = core.deps;
  const begin = clock.monotonicMs();
  const unread = { count: 0 };
  await readVms(core);
  await readSnapshots(core, unread);
  await readSandboxes(core, unread);
  const atOnce = pLimit(AT_ONCE);
  await Promise.all([...core.sandboxes.values()].map((entry) => atOnce(() => settleOrLog(core, entry))));
  await releaseUnclaimedVms(core);
  await removeUnownedResources(core);
  if (unread.count === 0) await core.layers.sweepAll();
  else logger.warn(unread, "disk layers are not swept: there are records that could not be read");
  logger.info(
    { sandboxes: core.sandboxes.size, snapshots: core.snapshots.size, ms: clock.monotonicMs() - begin },
    "recovered",
  );
}

async function readVms(core: Core): Promise<void> {
  const scan = await core.journal.scanVms();
  refuseOtherDrivers(core, scan.records);
  for (const record of scan.records) {
    core.formerVms.set(record.vmId, record);
    core.pool.places.slots.reserve(record.slot);
  }
  for (const { id, cause } of scan.broken)
    core.deps.logger.error({ vmId: id, err: cause }, "unreadable VM record");
}

/** Before anything is touched: with other drivers, what lives could be neither found nor undone. */
function refuseOtherDrivers({ deps: { host, network, vmm } }: Core, records: VmPlaceRecord[]): void {
  // Of an earlier boot nothing lives.
  const alive = records.filter(({ bootId }) => bootId === host.bootId);
  const drivers = (record: VmPlaceRecord): string =>
    `ROOKERY_VMM=${record.process?.kind ?? vmm.kind} ROOKERY_NETWORK=${record.lease.driver}`;
  const now = `ROOKERY_VMM=${vmm.kind} ROOKERY_NETWORK=${network.kind}`;
  const others = alive.filter((record) => drivers(record) !== now);
  if (others.length === 0) return;
  throw new RookeryError(
    "host_error",
    `${others.length} VMs on this host were started with ${drivers(others[0]!)}, and this agent runs with ${now}: ` +
      `start it with the former settings, or run \`rookery-agent cleanup\` with them, which ends what lives; then change`,
  );
}

async function readSnapshots(core: Core, unread: { count: number }): Promise<void> {
  const scan = await core.journal.scanSnapshots();
  for (const record of scan.records) core.snapshots.set(record.id, record);
  for (const id of scan.empty) await core.journal.removeSnapshotDir(id);
  for (const { id, cause } of scan.broken) {
    unread.count += 1;
    core.deps.logger.error({ snapshotId: id, err: cause }, "unreadable snapshot record: left as it is");
  }
}

async function readSandboxes(core: Core, unread: { count: number }): Promise<void> {
  const { clock, config, logger, rootDisk } = core.deps;
  const scan = await core.journal.scanSandboxes();
  for (const id of scan.empty) await core.journal.removeSandboxDir(id);
  for (const { id, cause } of scan.broken) {
    unread.count += 1;
    const path = await core.journal.setAside(id, String(clock.nowMs()));
    logger.error({ sandboxId: id, path, err: cause }, "unreadable sandbox record: set aside");
  }
  for (const record of scan.records) {
    const entry = new SandboxEntry(record, { maxQueued: config.maxQueuedPerSandbox, nowMs: clock.nowMs() });
    core.sandboxes.set(entry.id, entry);
    try {
      entry.disk = await rootDisk.open(core.journal.diskDir(entry.id));
    } catch (cause) {
      if (mayLackDisk(record)) continue;
      unread.count += 1;
      logger.error({ sandboxId: entry.id, err: cause }, "unreadable disk");
    }
  }
}

/** It was on its way in or out. */
function mayLackDisk({ phase }: SandboxRecord): boolean {
  return phase === "starting" || phase === "stopping" || phase === "failed";
}

async function settleOrLog(core: Core, entry: SandboxEntry): Promise<void> {
  const before = entry.phase;
  try {
    await settle(core, entry);
    if (entry.phase !== before) {
      core.deps.logger.info({ sandboxId: entry.id, before, now: entry.phase }, "settled");
    }
  } catch (cause) {
    core.deps.logger.error(
      { sandboxId: entry.id, phase: before, err: cause },
      "not settled: tried again later",
    );
  }
}

/** Waiting clones, and what an interrupted operation took and had not written down. */
async function releaseUnclaimedVms(core: Core): Promise<void> {
  const claimed = new Set([...core.sandboxes.values()].flatMap(({ record }) => record.vm?.vmId ?? []));
  const atOnce = pLimit(AT_ONCE);
  const releases = [...core.formerVms.values()]
    .filter(({ vmId }) => !claimed.has(vmId))
    // A failure is logged there, and tried again by the janitor.
    .map((record) => atOnce(() => core.pool.places.release(record, {}).catch(() => undefined)));
  await Promise.all(releases);
}

async function removeUnownedResources(core: Core): Promise<void> {
  const { config, network, cgroups, logger } = core.deps;
  using limit = undoLimit(core);
  const owned = new Set<string>([
    ...[...core.sandboxes.values()].flatMap(({ record }) => record.vm?.vmId ?? []),
    ...core.pool.places.leavingIds(),
  ]);
  for (const name of await cgroups.listOwned(config.cgroupPrefix)) {
    if (owned.has(name.slice(config.cgroupPrefix.length))) continue;
    logger.warn({ cgroup: name }, "removing a cgroup that nobody owns");
    await cgroups.remove(name, limit.signal);
  }
  for (const slot of await network.listOwnedSlots(limit.signal)) {
    if (core.pool.places.slots.has(slot)) continue;
    logger.warn({ slot }, "removing a network that nobody owns");
    await network.downSlot(slot, limit.signal);
  }
  for (const root of [config.socketRoot, join(config.dataDir, "vms")]) {
    for (const name of await entriesOf(root)) {
      if (/^vm[a-z0-9]{16}$/.test(name) && !owned.has(name)) await removeTree(join(root, name));
    }
  }
}

async function entriesOf(dir: string): Promise<string[]> {
  try {
    return await readdir(dir);
  } catch (cause) {
    if (isErrno(cause, "ENOENT")) return [];
    throw cause;
  }
}
