/** Cgroups of a simulated host: names in a directory. */
import { mkdirSync } from "node:fs";
import { readdir, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import type { ProcessTable } from "../vmm/simulated-processes.ts";
import type { VmCgroups } from "../vm-pool/vm-cgroups.ts";

/** Killing what is in a group is killing the processes whose place is the group's. */
export function openSimulatedCgroups(
  dir: string,
  processes: ProcessTable,
  trouble: (effect: string) => void,
): VmCgroups {
  mkdirSync(dir, { recursive: true });
  const path = (name: string) => join(dir, name.replace("/", "_"));
  return {
    async make(name) {
      trouble("cgroup.make");
      await writeFile(path(name), "");
      return [];
    },
    async remove(name) {
      trouble("cgroup.remove");
      for (const process of processes.all()) {
        if (name.endsWith(process.place.vmId)) processes.delete(process.pid);
      }
      await rm(path(name), { force: true });
    },
    async listOwned() {
      return (await readdir(dir)).map((name) => name.replace("_", "/"));
    },
  };
}
