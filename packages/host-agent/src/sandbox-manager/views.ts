/**
 * A sandbox as the rest of the agent sees it.
 */
import { isErrno } from "../host/errno.ts";
import type { Core, SandboxEntry } from "./core.ts";
import { expiresAtMs } from "./expiry.ts";
import { isHeld, shownPhase } from "./holding.ts";
import type { SandboxView } from "./sandbox.ts";

export async function viewOfSandbox(core: Core, entry: SandboxEntry): Promise<SandboxView> {
  const diskUsedBytes = await usedBytes(core, entry);
  // Taken after the wait, at once: a view never mixes two states.
  const { record } = entry;
  const nowMs = core.deps.clock.nowMs();
  const held = isHeld(record);
  return {
    id: entry.id,
    phase: shownPhase(record),
    inMemory: held,
    generation: record.generation,
    vcpus: record.spec.vcpus,
    memoryMb: record.spec.memoryMb,
    diskMb: record.spec.diskMb,
    lifetime: record.spec.lifetime,
    expiresAtUnixMs: expiresAtMs(entry, nowMs),
    startedAtUnixMs: record.startedAtMs,
    diskUsedBytes,
    ...(record.stranger !== undefined && { strangerForMs: Math.max(0, nowMs - record.stranger.sinceMs) }),
    ...(record.exit !== undefined && { exit: record.exit }),
  };
}

/** Really allocated: its disk's top and its memory layer. */
async function usedBytes(core: Core, entry: SandboxEntry): Promise<number> {
  const layerBytes = entry.record.layer?.allocatedBytes ?? 0;
  if (entry.disk === undefined) return layerBytes;
  try {
    return layerBytes + (await core.deps.rootDisk.allocatedBytes(entry.disk));
  } catch (cause) {
    // Its disk is being made or removed right now.
    if (isErrno(cause, "ENOENT")) return layerBytes;
    throw cause;
  }
}
