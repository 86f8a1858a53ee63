/**
 * A simulated machine: its "processes", disks and networks are small files in a
 * directory, or in memory; nothing else of the host is touched. No root, no
 * guest image and no namespace is needed.
 *
 * A real agent never uses it by itself. What it made is marked: an agent with
 * real drivers refuses a data directory of a simulated one, and the other way
 * round, so that nobody's sandboxes are taken for dead.
 */
import { createHash } from "node:crypto";
import { mkdir, readdir, readFile, statfs, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { RookeryError } from "@rookery/protocol/errors";
import { SimulatedGuests } from "../guest/simulated-guests.ts";
import { openSimulatedNetwork } from "../guest-network/simulated.ts";
import { writeFileAtomic } from "../host/atomic-file.ts";
import { isErrno } from "../host/errno.ts";
import type { GuestImage } from "../image/guest-image.ts";
import type { Machine } from "../machine.ts";
import { openSimulatedDisks } from "../root-disk/simulated.ts";
import type { Clock } from "../sandbox-manager/clock.ts";
import { sleep } from "../sandbox-manager/clock.ts";
import { openSimulatedCgroups } from "./simulated-cgroups.ts";
import { directoryProcessTable } from "../vmm/simulated-processes.ts";
import type { ProcessTable } from "../vmm/simulated-processes.ts";
import { openSimulatedVmm } from "../vmm/simulated.ts";
import { passTime } from "./timings.ts";

export interface SimulatedHostOptions {
  dataDir: string;
  clock: Clock;
  /** [0, 1): timings and pids come from it. */
  random: () => number;
  /** Default: files below the data directory, which outlive the agent's process. */
  processes?: ProcessTable;
  /** Another one is a reboot: no process lives on. Default: what DATA/simulated/boot-id says, if anything. */
  bootId?: string;
  /** Throws from within an effect, such as `disk.create`, where a test wants it to fail. */
  trouble?: (effect: string) => void;
  freeDiskBytes?: (path: string) => Promise<number>;
}

/** Guests need no such thing, and say so: what a template is called is all there is to it. */
const IMAGES = ["base"];
const IMAGE_DISK_BYTES = 4096 * (1 << 20);
const MARK = "simulated.json";
/** Of a data directory that has been used; the order of the agent's own layout. */
const USED = ["sandboxes", "vms", "snapshots"];

export async function openSimulatedHost(options: SimulatedHostOptions): Promise<Machine> {
  const { dataDir, clock, random, trouble = () => undefined } = options;
  await claimDataDir(dataDir);
  const dir = join(dataDir, "simulated");
  await mkdir(dir, { recursive: true, mode: 0o700 });
  const processes = options.processes ?? directoryProcessTable(join(dir, "processes"));
  const network = openSimulatedNetwork(join(dir, "networks"), trouble);
  await network.prepareHost?.(new AbortController().signal);
  const pause = passTime(clock, random);
  const vmm = openSimulatedVmm({ processes, random, pause, guestWritesDisk: true });
  return {
    vmm,
    vmmProbe: await vmm.probe(new AbortController().signal),
    rootDisk: openSimulatedDisks(trouble),
    network,
    host: {
      bootId: options.bootId ?? (await readBootId(dir)),
      freeDiskBytes: options.freeDiskBytes ?? freeDiskBytes,
      // Its pids are numbers of a table, and may be real ones of strangers.
      killProcess: async ({ pid }) => {
        vmm.crash(pid, { reason: "killed", message: "ended by its host" });
        return undefined;
      },
      killProcessesOf: () => Promise.resolve(),
      killProcessesIn: () => Promise.resolve(),
    },
    cgroups: openSimulatedCgroups(join(dir, "cgroups"), processes, trouble),
    uidBase: undefined,
    guests: new SimulatedGuests({
      processes,
      pause,
      sleep: (delayMs, signal) => sleep(clock, delayMs, signal),
      monotonicMs: () => clock.monotonicMs(),
      trouble,
      end: (pid, exit) => vmm.crash(pid, exit),
    }),
    images: { ensure: (name) => ensureImage(join(dir, "images"), name) },
  };
}

/** Refuses the data directory of an agent with real drivers; marks an unused one as simulated. */
async function claimDataDir(dataDir: string): Promise<void> {
  if (await isSimulated(dataDir)) return;
  for (const name of USED) {
    const entries = await readdir(join(dataDir, name)).catch((cause: unknown) => {
      if (isErrno(cause, "ENOENT")) return [];
      throw cause;
    });
    if (entries.length > 0) {
      throw new RookeryError(
        "wrong_state",
        `${dataDir} has real sandboxes or snapshots: a simulated VMM needs a data directory of its own`,
      );
    }
  }
  await writeFileAtomic(join(dataDir, MARK), '{"vmm":"simulated"}\n');
}

/** For an agent with real drivers. */
export async function refuseSimulatedData(dataDir: string): Promise<void> {
  if (!(await isSimulated(dataDir))) return;
  throw new RookeryError(
    "wrong_state",
    `${dataDir} was made by an agent with the simulated VMM: use another data directory`,
  );
}

async function isSimulated(dataDir: string): Promise<boolean> {
  try {
    await readFile(join(dataDir, MARK));
    return true;
  } catch (cause) {
    if (isErrno(cause, "ENOENT")) return false;
    throw cause;
  }
}

/** A test "reboots" the machine by another text there, and by taking its processes away. */
async function readBootId(dir: string): Promise<string> {
  try {
    return (await readFile(join(dir, "boot-id"), "utf8")).trim();
  } catch (cause) {
    if (isErrno(cause, "ENOENT")) return "simulated-boot-1";
    throw cause;
  }
}

async function freeDiskBytes(path: string): Promise<number> {
  const { bavail, bsize } = await statfs(path);
  return bavail * bsize;
}

async function ensureImage(imagesDir: string, name: string): Promise<GuestImage> {
  if (!IMAGES.includes(name)) {
    throw new RookeryError("template_not_found", `A simulated host has no image ${name}`);
  }
  const dir = join(imagesDir, name);
  await mkdir(dir, { recursive: true });
  const path = join(dir, "root.raw");
  // What a disk says before anyone ran on it.
  await writeFile(path, "0");
  return {
    name,
    hash: createHash("sha256").update(`simulated ${name}`).digest("hex"),
    dir,
    kernel: join(dir, "none"),
    initrd: join(dir, "none"),
    cmdline: "",
    rootDisk: { path, format: "raw", sizeBytes: IMAGE_DISK_BYTES },
    createdAt: new Date(0),
  };
}
