/**
 * A VMM without machines: for tests of what stands on the seam, and for control
 * planes that want thousands of sandboxes. It is never chosen by itself, and
 * says at every turn that it runs no guests.
 *
 * A guest is a handful of facts: what it remembers, and how often it ran. It
 * writes the latter to its disk each time it begins to run and remembers it, so
 * that a disk and a memory that do not belong together are found out at once
 * (`corrupt`).
 */
import { createHash } from "node:crypto";
import { closeSync, openSync, readFileSync, writeSync } from "node:fs";
import { mkdir, readFile } from "node:fs/promises";
import { join } from "node:path";
import { RookeryError } from "@rookery/protocol/errors";
import { z } from "zod";
import { readJson, writeFileAtomic } from "../host/atomic-file.ts";
import type { DiskAttachment } from "../root-disk/root-disk.ts";
import { memoryProcessTable, simulatedGuestSchema } from "./simulated-processes.ts";
import type { ProcessTable, SimulatedGuest, SimulatedProcess } from "./simulated-processes.ts";
import type {
  LayerCapture,
  MemoryBase,
  MemoryLayer,
  Vm,
  VmExit,
  VmmDriver,
  VmPlace,
  VmRecord,
  VmState,
} from "./vmm.ts";

/** What takes a VMM time. */
export type VmmOperation = "boot" | "spawn" | "thaw" | "freeze" | "write-layer";

export interface SimulatedVmmOptions {
  processes?: ProcessTable;
  /** Passes the time that a VMM takes; the default takes none. */
  pause?: (operation: VmmOperation, signal: AbortSignal) => Promise<void>;
  /** Of [0, 1): pids and start times come from it. */
  random?: () => number;
  /** Off where disks are real ones that a simulated guest must not write to. */
  guestWritesDisk?: boolean;
  fingerprint?: string;
}

export interface SimulatedVmmDriver extends VmmDriver {
  readonly processes: ProcessTable;
  /** The guest of a VM ends by itself. */
  crash(pid: number, exit: VmExit): void;
}

const layerManifestSchema = z.object({
  version: z.literal(1),
  baseSha256: z.string(),
  fingerprint: z.string(),
  guestSha256: z.string(),
  pageBytes: z.number().int(),
});
/** What people read who wonder. */
export const SIMULATED = "simulated: runs no guests; for scale and fault tests only";

const PAGE_BYTES = 4096;
const BASE_FILE = "memory.base";

export function openSimulatedVmm(options: SimulatedVmmOptions = {}): SimulatedVmmDriver {
  const host: SimulatedHost = {
    processes: options.processes ?? memoryProcessTable(),
    pause: options.pause ?? (() => Promise.resolve()),
    random: options.random ?? Math.random,
    guestWritesDisk: options.guestWritesDisk ?? false,
    fingerprint: options.fingerprint ?? "simulated-1",
    handles: new Map(),
  };
  const start = async (
    place: VmPlace,
    facts: Pick<SimulatedProcess, "shape" | "baseSha256" | "state" | "disk" | "guest">,
  ): Promise<SimulatedVm> => {
    let pid: number;
    do pid = 2 + Math.floor(host.random() * 4_000_000);
    while (host.processes.get(pid) !== undefined);
    host.processes.set({
      ...facts,
      pid,
      startTime: String(Math.floor(host.random() * 2 ** 40)),
      place,
      thawBegun: false,
      corrupt: false,
    });
    return new SimulatedVm(host, pid);
  };
  return {
    kind: "simulated",
    canForkRunning: true,
    processes: host.processes,
    async probe() {
      return { ok: true, acceleration: "none", version: "1", secure: false, reason: SIMULATED };
    },
    async fingerprint() {
      return host.fingerprint;
    },
    async boot({ place, shape, disk }, signal) {
      await host.pause("boot", signal);
      const guest = { memory: {}, runs: 0 };
      const vm = await start(place, { shape, baseSha256: undefined, state: "running", disk, guest });
      beginToRun(host, vm.process());
      return vm;
    },
    async spawnClone({ place, base, disk }, signal) {
      if (base.fingerprint !== host.fingerprint) {
        throw new RookeryError("host_error", "the warm image was made by another VMM");
      }
      const guest = await readBase(base);
      await host.pause("spawn", signal);
      const { shape, memorySha256: baseSha256 } = base;
      return await start(place, { shape, baseSha256, state: "waiting", disk, guest });
    },
    async adopt(place, record) {
      const found = host.processes.get(record.pid);
      if (found === undefined || found.startTime !== record.startTime) return undefined;
      if (found.place.vmId !== place.vmId) return undefined;
      // As QEMU does: one client at a time.
      if ((host.handles.get(found.pid)?.size ?? 0) > 0) {
        throw new RookeryError("timeout", "the VMM is in another client's hands");
      }
      return new SimulatedVm(host, found.pid);
    },
    crash(pid, exit) {
      host.processes.delete(pid);
      for (const end of host.handles.get(pid) ?? []) end(exit);
      host.handles.delete(pid);
    },
    async close() {
      host.handles.clear();
    },
  };
}

interface SimulatedHost extends Required<Omit<SimulatedVmmOptions, "processes">> {
  processes: ProcessTable;
  /** By pid: how to tell those who hold the VM that it has ended. */
  handles: Map<number, Set<(exit: VmExit) => void>>;
}

class SimulatedVm implements Vm {
  readonly place: VmPlace;
  readonly record: VmRecord;
  readonly exited: Promise<VmExit>;
  readonly #host: SimulatedHost;
  readonly #pid: number;

  constructor(host: SimulatedHost, pid: number) {
    this.#host = host;
    this.#pid = pid;
    const process = this.process();
    this.place = process.place;
    this.record = {
      kind: "simulated",
      vmId: process.place.vmId,
      pid,
      startTime: process.startTime,
      driver: {},
    };
    const { promise, resolve } = Promise.withResolvers<VmExit>();
    this.exited = promise;
    const handles = host.handles.get(pid) ?? new Set();
    host.handles.set(pid, handles.add(resolve));
  }

  get state(): VmState {
    return this.#host.processes.get(this.#pid)?.state ?? "exited";
  }

  /** The process itself; throws when it has ended. */
  process(): SimulatedProcess {
    const process = this.#host.processes.get(this.#pid);
    if (process === undefined) throw new RookeryError("guest_error", "the VM has ended");
    return process;
  }

  async thaw(
    options: { disk?: DiskAttachment; growDiskToBytes?: number; layer?: MemoryLayer },
    signal: AbortSignal,
  ): Promise<void> {
    this.#expect("waiting", signal);
    if (this.process().thawBegun) throw new RookeryError("wrong_state", "the VM was thawed before");
    this.#host.processes.set({ ...this.process(), thawBegun: true });
    const layer = options.layer === undefined ? undefined : await this.#readLayer(options.layer);
    await this.#host.pause("thaw", signal);
    const process = this.process();
    const disk = options.disk ?? process.disk;
    const sizeBytes = options.growDiskToBytes ?? disk.sizeBytes;
    beginToRun(this.#host, { ...process, disk: { ...disk, sizeBytes }, guest: layer ?? process.guest });
  }

  async freeze(signal: AbortSignal): Promise<void> {
    this.#expect("running", signal);
    await this.#host.pause("freeze", signal);
    this.#host.processes.set({ ...this.process(), state: "frozen" });
  }

  async unfreeze(signal: AbortSignal): Promise<void> {
    this.#expect("frozen", signal);
    if (this.process().baseSha256 === undefined) {
      throw new RookeryError("wrong_state", "what became a base does not go on");
    }
    this.#host.processes.set({ ...this.process(), state: "running" });
  }

  async captureLayer(signal: AbortSignal): Promise<LayerCapture> {
    this.#expect("frozen", signal);
    const { guest, baseSha256 } = this.process();
    if (baseSha256 === undefined) throw new RookeryError("wrong_state", "it stands on no memory base");
    const text = JSON.stringify(guest);
    const pageBytes = Math.ceil(text.length / PAGE_BYTES) * PAGE_BYTES;
    const { fingerprint, pause } = this.#host;
    return {
      pageBytes,
      async writeTo(dir, signal) {
        signal.throwIfAborted();
        await pause("write-layer", signal);
        await mkdir(dir, { recursive: true });
        await writeFileAtomic(join(dir, "guest.json"), text, { sync: false });
        const manifest = { version: 1, baseSha256, fingerprint, guestSha256: sha256(text), pageBytes };
        await writeFileAtomic(join(dir, "manifest.json"), JSON.stringify(manifest), { sync: false });
        return { dir, pageBytes, allocatedBytes: pageBytes + PAGE_BYTES };
      },
    };
  }

  async switchDiskTop(next: DiskAttachment, signal: AbortSignal): Promise<void> {
    this.#expect("frozen", signal);
    this.#host.processes.set({ ...this.process(), disk: next });
  }

  async saveBase(dir: string, signal: AbortSignal): Promise<MemoryBase> {
    this.#expect("frozen", signal);
    const { baseSha256, guest, shape } = this.process();
    if (baseSha256 !== undefined)
      throw new RookeryError("wrong_state", "only a cold-booted VM becomes a base");
    const text = JSON.stringify(guest);
    await mkdir(dir, { recursive: true });
    await writeFileAtomic(join(dir, BASE_FILE), text, { sync: false });
    const { fingerprint } = this.#host;
    return { dir, shape, memorySha256: sha256(text), deviceStateSha256: sha256(""), fingerprint };
  }

  async ping(signal: AbortSignal): Promise<void> {
    signal.throwIfAborted();
    if (this.state === "exited") throw new RookeryError("timeout", "the VMM does not answer");
  }

  async kill(): Promise<void> {
    this.#host.processes.delete(this.#pid);
    for (const end of this.#host.handles.get(this.#pid) ?? []) end({ reason: "killed", message: "killed" });
    this.#host.handles.delete(this.#pid);
  }

  async #readLayer(layer: MemoryLayer): Promise<SimulatedGuest> {
    const manifest = await readOrRefuse(readJson(join(layer.dir, "manifest.json"), layerManifestSchema));
    const text = await readOrRefuse(readFile(join(layer.dir, "guest.json"), "utf8"));
    if (
      manifest.guestSha256 !== sha256(text) ||
      manifest.baseSha256 !== this.process().baseSha256 ||
      manifest.fingerprint !== this.#host.fingerprint
    ) {
      throw new RookeryError("host_error", "the memory layer does not fit this VM");
    }
    return simulatedGuestSchema.parse(JSON.parse(text));
  }

  #expect(state: VmState, signal: AbortSignal): void {
    signal.throwIfAborted();
    if (this.state !== state) throw new RookeryError("wrong_state", `the VM is ${this.state}, not ${state}`);
  }
}

async function readBase(base: MemoryBase): Promise<SimulatedGuest> {
  const text = await readOrRefuse(readFile(join(base.dir, BASE_FILE), "utf8"));
  if (sha256(text) !== base.memorySha256) {
    throw new RookeryError("host_error", "the warm image is not what its manifest says");
  }
  return simulatedGuestSchema.parse(JSON.parse(text));
}

async function readOrRefuse<T>(reading: Promise<T>): Promise<T> {
  try {
    return await reading;
  } catch (cause) {
    throw new RookeryError("host_error", "what the VM was to be made of cannot be read", { cause });
  }
}

/**
 * The guest's first act: to compare its memory with its disk, and to write to
 * both. The disk first: where it is full, or the agent is killed between the
 * two, the guest did not run, and its disk may show that it moved on.
 */
function beginToRun(host: SimulatedHost, process: SimulatedProcess): void {
  const onDisk = readRuns(host, process);
  const corrupt = process.corrupt || (onDisk !== undefined && onDisk !== process.guest.runs);
  const guest = { ...process.guest, runs: process.guest.runs + 1 };
  if (host.guestWritesDisk) overwrite(topFileOf(process), String(guest.runs));
  host.processes.set({ ...process, state: "running", guest, corrupt });
}

/** In its place, as a guest's block is: what was there stays where there is no room. */
function overwrite(path: string, text: string): void {
  const file = openSync(path, "r+");
  try {
    writeSync(file, text, 0);
  } finally {
    closeSync(file);
  }
}

/** Through the chain: the topmost file that was ever written to. */
function readRuns(host: SimulatedHost, process: SimulatedProcess): number | undefined {
  if (!host.guestWritesDisk || process.disk.kind !== "file-chain") return undefined;
  for (const { file } of process.disk.nodes) {
    const text = readFileSync(join(process.place.runDir, file), "utf8");
    if (text !== "") return Number(text);
  }
  return 0;
}

function topFileOf({ disk, place }: SimulatedProcess): string {
  if (disk.kind !== "file-chain") throw new Error("a simulated guest writes to files only");
  return join(place.runDir, disk.nodes[0]!.file);
}

function sha256(text: string): string {
  return createHash("sha256").update(text).digest("hex");
}
