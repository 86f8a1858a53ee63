/**
 * What this host still takes. Refusals are `no_capacity` and `out_of_disk`: the
 * control plane asks another host.
 */
import { RookeryError } from "@rookery/protocol/errors";
import type { Core } from "./core.ts";

/** Guest memory of all that has or is about to have a VM. */
export function committedMemoryMb(core: Core): number {
  let sumMb = 0;
  for (const { phase, record, placed, isResuming } of core.sandboxes.values()) {
    const isLive = phase !== "paused" && phase !== "failed";
    if (isLive || isResuming || placed !== undefined) sumMb += record.spec.memoryMb;
  }
  return sumMb;
}

/** Without waiting between the look and the entry that takes it: nobody can come between. */
export function requireMemory(core: Core, memoryMb: number): void {
  const { memoryBudgetMb } = core.deps.config;
  const freeMb = memoryBudgetMb - committedMemoryMb(core);
  if (memoryMb > freeMb) {
    throw new RookeryError("no_capacity", `this host has ${Math.max(freeMb, 0)} MB of guest memory left`);
  }
}

export function requireRoom(core: Core): void {
  if (core.sandboxes.size >= core.deps.config.maxSandboxes) {
    throw new RookeryError("no_capacity", `this host holds ${core.sandboxes.size} sandboxes already`);
  }
}

export async function requireDiskReserve(core: Core): Promise<void> {
  const { host, config } = core.deps;
  const freeBytes = await host.freeDiskBytes(config.dataDir);
  if (freeBytes < config.diskReserveBytes) {
    throw new RookeryError("out_of_disk", "this host's disk is nearly full");
  }
}
