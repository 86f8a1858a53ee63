/**
 * The agent's core, opened: recovery first, then the watches, the pool last.
 */
import { mkdir } from "node:fs/promises";
import { join } from "node:path";
import { EventLog } from "../events/event-log.ts";
import { Journal } from "../journal/journal.ts";
import { Tombstones } from "../journal/tombstones.ts";
import { VmPool } from "../vm-pool/vm-pool.ts";
import type { Core } from "./core.ts";
import type { Deps } from "./deps.ts";
import { DiskLayers } from "./disk-layers.ts";
import { randomHex } from "./new-ids.ts";
import { recover } from "./recovery.ts";
import { SandboxManager } from "./sandbox-manager.ts";
import { startWatches } from "./watches.ts";
import { WorkLimit } from "./work-limit.ts";

export { MANAGER_DEFAULTS, type Deps } from "./deps.ts";
export { systemClock } from "./clock.ts";
export { FAILPOINTS } from "./operations.ts";
export type { SandboxManager } from "./sandbox-manager.ts";

export async function openSandboxManager(deps: Deps): Promise<SandboxManager> {
  const { manager } = await openCore(deps);
  manager.warmPool();
  manager.startUploads();
  return manager;
}

/** For tests, which look behind the manager. */
export async function openCore(deps: Deps): Promise<{ core: Core; manager: SandboxManager }> {
  const { config, clock } = deps;
  await mkdir(config.socketRoot, { recursive: true, mode: 0o711 });
  const journal = new Journal(config.dataDir);
  await journal.open();
  const workLimit = new WorkLimit(config.workLimit, clock);
  const sandboxes: Core["sandboxes"] = new Map();
  const snapshots: Core["snapshots"] = new Map();
  const layers = new DiskLayers(journal.layersDir, function* () {
    for (const { disk } of sandboxes.values()) if (disk !== undefined) yield disk.chain;
    for (const { chain } of snapshots.values()) yield chain;
  });
  const core: Core = {
    deps,
    journal,
    tombstones: await Tombstones.open(
      join(config.dataDir, "tombstones.jsonl"),
      config.tombstones,
      clock.nowMs(),
    ),
    events: await EventLog.open({
      dir: join(config.dataDir, "events"),
      newLogId: () => randomHex(deps, 16),
      maxEvents: config.maxEvents,
    }),
    pool: new VmPool(deps, journal, workLimit),
    workLimit,
    layers,
    sandboxes,
    snapshots,
    formerVms: new Map(),
  };
  await recover(core);
  return { core, manager: new SandboxManager(core, startWatches(core)) };
}
