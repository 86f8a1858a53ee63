/**
 * What a product's agent owns on this machine, read from the machine itself and
 * not from the agent: to show that what came is gone again.
 */
import { execFileSync } from "node:child_process";
import { readFileSync, readdirSync, readlinkSync } from "node:fs";
import { join } from "node:path";

export interface Inventory {
  /** pids of VMMs whose command line or working files belong to the data directory. */
  vmms: number[];
  namespaces: string[];
  links: string[];
  loopDevices: string[];
  mounts: string[];
  sandboxDirs: string[];
  vmDirs: string[];
  snapshotDirs: string[];
  layerDirs: string[];
  cgroups: string[];
}

export function takeInventory(agentDataDir: string): Inventory {
  return {
    vmms: vmmPids(agentDataDir),
    namespaces: lines(["ip", "netns", "list"]).map((line) => line.split(" ")[0] ?? ""),
    links: (JSON.parse(execFileSync("ip", ["-j", "link"], { encoding: "utf8" })) as { ifname: string }[]).map(
      (link) => link.ifname,
    ),
    loopDevices: lines(["losetup", "--noheadings", "-O", "NAME"]),
    mounts: readFileSync("/proc/self/mounts", "utf8").trim().split("\n"),
    sandboxDirs: entries(join(agentDataDir, "sandboxes")),
    vmDirs: entries(join(agentDataDir, "vms")),
    snapshotDirs: entries(join(agentDataDir, "snapshots")),
    layerDirs: entries(join(agentDataDir, "layers")),
    cgroups: entries("/sys/fs/cgroup/memory/rookery").concat(entries("/sys/fs/cgroup/rookery")),
  };
}

/** The same as numbers: a pool exchanges its members, and keeps its size. */
export function sizes(inventory: Inventory): Record<keyof Inventory, number> {
  return Object.fromEntries(
    Object.entries(inventory).map(([name, things]) => [name, (things as unknown[]).length]),
  ) as Record<keyof Inventory, number>;
}

/** VMMs whose only writable directory lies in this agent's data, once they are past their launcher. */
export function vmmPids(agentDataDir: string): number[] {
  return readdirSync("/proc")
    .filter((name) => /^\d+$/.test(name))
    .filter(
      (pid) =>
        ofProcess(() => readlinkSync(`/proc/${pid}/exe`)).includes("qemu-system") &&
        ofProcess(() => readFileSync(`/proc/${pid}/mountinfo`, "utf8")).includes(agentDataDir),
    )
    .map(Number);
}

/** What `read` says of a process; empty when it is gone, none of user space, or one that even root may not look into. */
function ofProcess(read: () => string): string {
  try {
    return read();
  } catch (cause) {
    if (["ENOENT", "ESRCH", "EINVAL", "EACCES"].includes((cause as NodeJS.ErrnoException).code ?? ""))
      return "";
    throw cause;
  }
}

function entries(dir: string): string[] {
  try {
    return readdirSync(dir).filter((name) => !name.startsWith("."));
  } catch (cause) {
    if ((cause as NodeJS.ErrnoException).code === "ENOENT") return [];
    throw cause;
  }
}

function lines([program, ...args]: [string, ...string[]]): string[] {
  return execFileSync(program, args, { encoding: "utf8" })
    .split("\n")
    .filter((line) => line !== "");
}
