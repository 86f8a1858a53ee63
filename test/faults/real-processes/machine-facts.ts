/**
 * One host as it really is: what its agent says, what its journal says, and
 * what lies on its disk and runs in its namespace, read from there. The oracle
 * holds them against each other.
 */
import { existsSync, readFileSync, readdirSync, readlinkSync, statSync } from "node:fs";
import { join } from "node:path";
import { z } from "zod";
import type { HostAgent } from "../../../packages/control-plane/src/hosts/host-agent.ts";
import { temporaryPathOf } from "../../../packages/host-agent/src/host/atomic-file.ts";
import { Journal } from "../../../packages/host-agent/src/journal/journal.ts";
import type { DiskLayer } from "../../../packages/host-agent/src/root-disk/root-disk.ts";
import { readDiskManifest } from "../../../packages/host-agent/src/root-disk/disk-manifest.ts";
import type { SimulatedProcess } from "../../../packages/host-agent/src/vmm/simulated-processes.ts";
import type { MachineFacts } from "../world.ts";

const LIST_LIMIT = 1_000;
/** An idle agent holds some thirty; one for each sandbox, call or event would show. */
const MAX_OPEN_FILES = 200;
const head = z.object({
  logId: z.string(),
  acknowledged: z.string().transform(BigInt),
  droppedThrough: z.string().transform(BigInt),
});
const event = z.object({ number: z.string().transform(BigInt) });

export interface Machine {
  hostId: string;
  dataDir: string;
  pid: number;
  /** Of its network. */
  namespace: string;
  agent: HostAgent;
}

export async function readFacts(machine: Machine): Promise<MachineFacts> {
  const { hostId, dataDir, agent } = machine;
  const journal = new Journal(dataDir);
  const [sandboxes, vms, snapshots] = await Promise.all([
    journal.scanSandboxes(),
    journal.scanVms(),
    journal.scanSnapshots(),
  ]);
  const said = await agent.listSandboxes({ limit: LIST_LIMIT, after: "" }, new AbortController().signal);
  const vmOf = new Map(sandboxes.records.map(({ spec, vm }) => [String(spec.id), vm?.vmId]));
  const disks = await Promise.all(sandboxes.records.map(({ spec }) => chainOf(journal.diskDir(spec.id))));
  const layers = [...disks, ...snapshots.records.map(({ chain }) => chain)]
    .flat()
    // A warm image's layer lies with its image.
    .flatMap((layer) =>
      layer.kind === "layer" && layer.path.startsWith(journal.layersDir) ? [layer.id] : [],
    );
  const processes = readProcesses(dataDir);
  const simulated = (kind: string) => namesIn(join(dataDir, "simulated", kind));
  const owners = sandboxes.records.flatMap(({ vm }) => (vm === undefined ? [] : [vm.vmId]));
  const leaks = [
    ...differences(
      "sandbox that the agent tells of",
      said.items.map(({ id }) => id),
      sandboxes.records.map(({ spec }) => spec.id),
    ),
    ...differences(
      "VM's process",
      processes.map(({ place }) => place.vmId),
      owners,
    ),
    ...differences(
      "VM's record",
      vms.records.map(({ vmId }) => vmId),
      owners,
    ),
    ...differences(
      "network",
      simulated("networks"),
      vms.records.map(({ slot }) => String(slot)),
    ),
    ...differences(
      "cgroup",
      simulated("cgroups").map((name) => name.slice(name.lastIndexOf("_") + 1)),
      owners,
    ),
    ...differences("VM's directory", namesIn(join(dataDir, "vms")), owners),
    ...differences("sockets", namesIn(join(dataDir, "sockets")), owners),
    ...differences(
      "sandbox's directory",
      namesIn(join(dataDir, "sandboxes")),
      sandboxes.records.map(({ spec }) => spec.id),
    ),
    ...differences(
      "snapshot's directory",
      namesIn(join(dataDir, "snapshots")),
      snapshots.records.map(({ id }) => id),
    ),
    ...differences("disk layer", namesIn(join(dataDir, "layers")), layers),
    ...sandboxes.records.flatMap(({ spec: { id }, layer }) => {
      const there = namesIn(journal.sandboxDir(id)).filter((name) => name.startsWith("layer-"));
      return differences(`memory layer of ${id}`, there, layer ? [layer.name] : []);
    }),
    ...[...sandboxes.broken, ...vms.broken, ...snapshots.broken].map(({ id }) => `a broken record: ${id}`),
    ...namesIn(join(dataDir, "lost")).map((name) => `set aside as unreadable: ${name}`),
    ...temporaryFiles(dataDir),
    ...strangers(machine),
  ];
  return {
    hostId,
    isUp: true,
    sandboxes: said.items.map(({ id, phase, generation }) => ({ id, phase, generation, vmId: vmOf.get(id) })),
    vms: processes.map(({ place, state, corrupt, guest }) => ({
      vmId: place.vmId,
      state,
      corrupt,
      memory: guest.memory,
    })),
    snapshots: snapshots.records.map(({ id }) => id),
    leaks,
    ...readEventLog(join(dataDir, "events")),
  };
}

/** All simulated VMs of a data directory. */
export function readProcesses(dataDir: string): SimulatedProcess[] {
  const dir = join(dataDir, "simulated", "processes");
  return namesIn(dir)
    .filter((name) => name.endsWith(".json"))
    .flatMap((name) => {
      // It may end while we look.
      const text = unlessGone(() => readFileSync(join(dir, name), "utf8"));
      return text === undefined ? [] : [JSON.parse(text) as SimulatedProcess];
    });
}

async function chainOf(diskDir: string): Promise<readonly DiskLayer[]> {
  if (!existsSync(diskDir)) return [];
  return (await readDiskManifest(diskDir, "simulated")).chain;
}

function readEventLog(dir: string): { eventLogId: string; lastEvent: bigint } {
  const { logId, acknowledged, droppedThrough } = head.parse(
    JSON.parse(readFileSync(join(dir, "log.json"), "utf8")),
  );
  const numbers = namesIn(dir)
    .filter((name) => name.endsWith(".jsonl"))
    .flatMap((name) => readFileSync(join(dir, name), "utf8").split("\n").slice(0, -1))
    .map((line) => event.parse(JSON.parse(line)).number);
  const lastEvent = [acknowledged, droppedThrough, ...numbers].reduce((a, b) => (a > b ? a : b));
  return { eventLogId: logId, lastEvent };
}

/** What a file was to be replaced with, and nobody takes away. */
function temporaryFiles(dataDir: string): string[] {
  const mark = temporaryPathOf("x").split("x");
  return readdirSync(dataDir, { recursive: true, encoding: "utf8" })
    .filter((path) => {
      const name = path.slice(path.lastIndexOf("/") + 1);
      return (name.startsWith(mark[0]!) && name.endsWith(mark[1]!)) || name.endsWith(".json.tmp");
    })
    .map((path) => `a temporary file: ${path}`);
}

/** Of its namespace's processes, the agent alone is right. */
function strangers({ pid, namespace }: Machine): string[] {
  const { ino } = statSync(namespace);
  const others = readdirSync("/proc")
    .filter((name) => /^\d+$/.test(name) && Number(name) !== pid)
    .filter((name) => unlessGone(() => readlinkSync(`/proc/${name}/ns/net`)) === `net:[${ino}]`)
    .map((name) => `a process of nobody: ${name}`);
  const files = unlessGone(() => readdirSync(`/proc/${pid}/fd`).length) ?? 0;
  return files > MAX_OPEN_FILES ? [...others, `the agent holds ${files} files open`] : others;
}

function unlessGone<T>(look: () => T): T | undefined {
  try {
    return look();
  } catch (cause) {
    if (cause instanceof Error && "code" in cause && (cause.code === "ENOENT" || cause.code === "ESRCH"))
      return undefined;
    throw cause;
  }
}

function differences(what: string, there: readonly string[], owned: readonly string[]): string[] {
  const has = new Set(there);
  const wanted = new Set(owned);
  return [
    ...[...has].filter((name) => !wanted.has(name)).map((name) => `${what} of nobody: ${name}`),
    ...[...wanted].filter((name) => !has.has(name)).map((name) => `${what} is not there: ${name}`),
  ];
}

function namesIn(dir: string): string[] {
  return existsSync(dir) ? readdirSync(dir) : [];
}
