/**
 * The processes of a simulated host: a table that outlives the driver, as real
 * VMMs outlive the agent. One in a directory outlives even this process.
 */
import { mkdirSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { z } from "zod";
import { isErrno } from "../host/errno.ts";
import type { DiskAttachment } from "../root-disk/root-disk.ts";
import type { VmPlace, VmShape, VmState } from "./vmm.ts";

export const simulatedGuestSchema = z.object({
  /** What programs in the guest hold in memory. */
  memory: z.record(z.string(), z.string()),
  /** How often it began to run; the disk says the same. */
  runs: z.number().int(),
});
export type SimulatedGuest = z.output<typeof simulatedGuestSchema>;

export interface SimulatedProcess {
  pid: number;
  startTime: string;
  place: VmPlace;
  shape: VmShape;
  /** Of its memory base; undefined when it was cold-booted. */
  baseSha256: string | undefined;
  state: Exclude<VmState, "exited">;
  guest: SimulatedGuest;
  disk: DiskAttachment;
  /** A clone is thawed once, also when that failed. */
  thawBegun: boolean;
  /** It was given a disk that its memory does not fit. */
  corrupt: boolean;
}

/** What it gives back is not to be changed: `set` replaces. */
export interface ProcessTable {
  get(pid: number): SimulatedProcess | undefined;
  /** The one whose guest is reached at `port` of the simulated network. */
  atPort(port: number): SimulatedProcess | undefined;
  set(process: SimulatedProcess): void;
  delete(pid: number): void;
  all(): SimulatedProcess[];
}

export function memoryProcessTable(): ProcessTable {
  const byPid = new Map<number, SimulatedProcess>();
  const pidAtPort = new Map<number, number>();
  return {
    get: (pid) => byPid.get(pid),
    atPort(port) {
      const pid = pidAtPort.get(port);
      return pid === undefined ? undefined : byPid.get(pid);
    },
    set(process) {
      byPid.set(process.pid, process);
      const port = portOf(process);
      if (port !== undefined) pidAtPort.set(port, process.pid);
    },
    delete(pid) {
      const process = byPid.get(pid);
      if (process === undefined) return;
      byPid.delete(pid);
      const port = portOf(process);
      if (port !== undefined && pidAtPort.get(port) === pid) pidAtPort.delete(port);
    },
    all: () => [...byPid.values()],
  };
}

/**
 * Written through to a file for each process, so that they outlive whoever
 * simulates them. One user at a time: the files are read when it is opened.
 */
export function directoryProcessTable(dir: string): ProcessTable {
  mkdirSync(dir, { recursive: true });
  const table = memoryProcessTable();
  const path = (pid: number) => join(dir, `${pid}.json`);
  for (const name of readdirSync(dir)) {
    // Our own file, written whole: its form is not in doubt.
    if (name.endsWith(".json"))
      table.set(JSON.parse(readFileSync(join(dir, name), "utf8")) as SimulatedProcess);
  }
  return {
    ...table,
    set(process) {
      const half = `${path(process.pid)}.tmp`;
      try {
        writeFileSync(half, JSON.stringify(process));
        renameSync(half, path(process.pid));
      } catch (cause) {
        rmSync(half, { force: true });
        throw cause;
      }
      table.set(process);
    },
    delete(pid) {
      try {
        rmSync(path(pid));
      } catch (cause) {
        if (!isErrno(cause, "ENOENT")) throw cause;
      }
      table.delete(pid);
    },
  };
}

function portOf({ place: { nic } }: SimulatedProcess): number | undefined {
  return nic.kind === "simulated" ? nic.port : undefined;
}
