/**
 * One QEMU virtual machine: the promises of `Vm`, kept by QMP commands.
 *
 * Invariants: a waiting clone is thawed at most once, whether that succeeds or
 * not, because after `cont` its disk has moved on; device states to and from QEMU
 * pass through one memfd that it inherited, never through a path that it could redirect.
 */
import { ftruncateSync } from "node:fs";
import { RookeryError } from "@rookery/protocol/errors";
import type { Memfd } from "../../host/memfd.ts";
import type { DiskAttachment } from "../../root-disk/root-disk.ts";
import { MAX_DEVICE_STATE_BYTES, type LoadedBase } from "../memory/memory-base.ts";
import { captureMemoryLayer, VerifiedLayer } from "../memory/memory-layer.ts";
import { findMemory } from "../memory/private-pages.ts";
import { saveMemoryBase } from "../memory/save-base.ts";
import type {
  LayerCapture,
  MemoryBase,
  MemoryLayer,
  Vm,
  VmExit,
  VmPlace,
  VmRecord,
  VmState,
} from "../vmm.ts";
import { VMM_FD } from "./arguments.ts";
import { composeStream, deviceSections, memoryPrefixBytes } from "./device-state.ts";
import { exchangeDisk, growDisk, pushDiskTop } from "./disk.ts";
import type { QemuProcess } from "./qemu-process.ts";
import { receiveStream, STREAM_URI } from "./receive-stream.ts";
import type { QemuRecord } from "./record.ts";

/** Devices alone load in about 10 ms; a busy host takes its time. */
const MIGRATION_TIMEOUT_MS = 30_000;
/** `stop` drains the disk. */
const STOP_TIMEOUT_MS = 30_000;
const PING_TIMEOUT_MS = 5_000;

/** Where the guest's memory is, and what it is compared with. */
export type GuestMemory = { kind: "clone"; base: LoadedBase } | { kind: "booted"; memory: Memfd };

export interface QemuVmParts {
  qemu: QemuProcess;
  record: VmRecord;
  facts: QemuRecord;
  memory: GuestMemory;
  /** The memfd behind VMM_FD.stream and VMM_FD.state. */
  streams: Memfd;
}

export class QemuVm implements Vm {
  readonly place: VmPlace;
  readonly record: VmRecord;
  readonly exited: Promise<VmExit>;
  readonly #qemu: QemuProcess;
  readonly #facts: QemuRecord;
  readonly #memory: GuestMemory;
  readonly #streams: Memfd;
  #state: VmState;
  #wasThawed = false;
  #wasSaved = false;

  /** The VM owns the parts from now on, and gives them back when its process has ended. */
  constructor(parts: QemuVmParts, state: Exclude<VmState, "exited">) {
    this.place = parts.qemu.place;
    this.record = parts.record;
    this.#qemu = parts.qemu;
    this.#facts = parts.facts;
    this.#memory = parts.memory;
    this.#streams = parts.streams;
    this.#state = state;
    this.#wasThawed = state !== "waiting";
    this.exited = parts.qemu.exited.then((exit) => {
      this.#state = "exited";
      releaseMemory(parts.memory);
      parts.streams[Symbol.dispose]();
      return exit;
    });
  }

  get state(): VmState {
    return this.#state;
  }

  async thaw(
    options: { disk?: DiskAttachment; growDiskToBytes?: number; layer?: MemoryLayer },
    signal: AbortSignal,
  ): Promise<void> {
    this.#expect("waiting", "be thawed");
    if (this.#memory.kind !== "clone" || this.#wasThawed) {
      throw new RookeryError("wrong_state", "This VM has been thawed before.");
    }
    const { base } = this.#memory;
    this.#wasThawed = true;
    await this.#attempt("The VM could not be brought to life.", async () => {
      let stream = base.stream.whole;
      if (options.layer !== undefined) {
        await using layer = await VerifiedLayer.open(
          options.layer.dir,
          base.base,
          this.#facts.fingerprint,
          signal,
        );
        const memory = await findMemory(this.#qemu.identity.pid, base.memfd.identity, base.memoryBytes);
        await layer.loadInto(this.#qemu.identity.pid, memory, signal);
        stream = composeStream(base.stream.memoryPrefix, layer.deviceSections);
      }
      if (options.disk !== undefined) await exchangeDisk(this.#qemu, options.disk, signal);
      await this.#loadDevices(stream, signal);
      if (options.growDiskToBytes !== undefined) {
        await growDisk(this.#qemu, options.growDiskToBytes, signal);
      }
      await this.#qemu.command("cont", {}, { signal });
      this.#state = "running";
    });
  }

  async freeze(signal: AbortSignal): Promise<void> {
    this.#expect("running", "be frozen");
    await this.#attempt("The VM could not be frozen.", async () => {
      // Drains and flushes the disk too. (QEMU softmmu/cpus.c, do_vm_stop)
      await this.#qemu.command("stop", {}, { signal, timeoutMs: STOP_TIMEOUT_MS });
      this.#state = "frozen";
    });
  }

  async unfreeze(signal: AbortSignal): Promise<void> {
    this.#expect("frozen", "go on");
    if (this.#wasSaved) throw new RookeryError("wrong_state", "A VM that became a memory base cannot go on.");
    await this.#attempt("The VM could not go on.", async () => {
      await this.#qemu.command("cont", {}, { signal });
      this.#state = "running";
    });
  }

  async captureLayer(signal: AbortSignal): Promise<LayerCapture> {
    this.#expect("frozen", "be captured");
    if (this.#memory.kind !== "clone") {
      throw new RookeryError("wrong_state", "A cold-booted VM has no memory base to differ from.");
    }
    const { pid } = this.#qemu.identity;
    // A process that dies meanwhile gives its base back, which is still being read here.
    const base = this.#memory.base.retain();
    try {
      return await this.#attempt("The VM's memory could not be read.", async () => {
        const sections = deviceSections(await this.#saveDevices(signal));
        const memory = await findMemory(pid, base.memfd.identity, base.memoryBytes);
        const spillDir = this.place.logDir;
        return captureMemoryLayer({ pid, memory, base, deviceSections: sections, spillDir }, signal);
      });
    } finally {
      base.release();
    }
  }

  async switchDiskTop(next: DiskAttachment, signal: AbortSignal): Promise<void> {
    this.#expect("frozen", "get another disk");
    await this.#attempt("The VM's disk could not be switched.", () => pushDiskTop(this.#qemu, next, signal));
  }

  async saveBase(dir: string, signal: AbortSignal): Promise<MemoryBase> {
    this.#expect("frozen", "be saved");
    if (this.#memory.kind !== "booted" || this.#wasSaved) {
      throw new RookeryError("wrong_state", "Only a cold-booted VM becomes a memory base, and once.");
    }
    const { memory } = this.#memory;
    const { shape, fingerprint } = this.#facts;
    this.#wasSaved = true;
    return this.#attempt("The VM could not be saved as a warm image.", async () => {
      const sections = deviceSections(await this.#saveDevices(signal));
      const send = (): Promise<void> =>
        this.#qemu.migrate(() => this.#qemu.command("migrate", { uri: STREAM_URI }, { signal }), {
          signal,
          timeoutMs: MIGRATION_TIMEOUT_MS,
        });
      const stream = await receiveStream(this.place, MAX_DEVICE_STATE_BYTES, send, signal);
      const prefix = memoryPrefixBytes(stream, sections);
      return saveMemoryBase({ dir, memory, shape, fingerprint, stream, memoryPrefixBytes: prefix }, signal);
    });
  }

  async ping(signal: AbortSignal): Promise<void> {
    const answer = await this.#qemu
      .command("query-status", {}, { signal, timeoutMs: PING_TIMEOUT_MS })
      .catch((cause: unknown) => {
        signal.throwIfAborted();
        throw new RookeryError("timeout", "The VMM does not answer.", { cause });
      });
    // The host's disk was full: QEMU stopped the guest. Going on repeats the write that failed.
    if (answer.status === "io-error" && this.#state === "running") {
      await this.#qemu.command("cont", {}, { signal });
    }
  }

  async kill(): Promise<void> {
    await this.#qemu.kill();
    await this.exited;
  }

  /** Device sections without memory, in a stream of their own. */
  async #saveDevices(signal: AbortSignal): Promise<Buffer> {
    await this.#qemu.command(
      "xen-save-devices-state",
      { filename: `/proc/self/fd/${VMM_FD.state}`, live: false },
      { signal, timeoutMs: MIGRATION_TIMEOUT_MS },
    );
    return this.#streams.read(MAX_DEVICE_STATE_BYTES);
  }

  async #loadDevices(stream: Buffer, signal: AbortSignal): Promise<void> {
    ftruncateSync(this.#streams.fd, 0);
    this.#streams.write(stream, 0);
    await this.#qemu.migrate(
      () => this.#qemu.command("migrate-incoming", { uri: `fd:${VMM_FD.stream}` }, { signal }),
      { signal, timeoutMs: MIGRATION_TIMEOUT_MS },
    );
    const { status } = await this.#qemu.command("query-status", {}, { signal });
    if (status !== "paused") throw new Error(`after its state was loaded the VM is ${status}, not paused`);
  }

  #expect(state: VmState, what: string): void {
    if (this.#state === state) return;
    throw new RookeryError("wrong_state", `A VM that is ${this.#state} cannot ${what}.`);
  }

  async #attempt<T>(message: string, work: () => Promise<T>): Promise<T> {
    try {
      return await work();
    } catch (cause) {
      throw await this.#qemu.failure(message, cause);
    }
  }
}

export function releaseMemory(memory: GuestMemory): void {
  if (memory.kind === "clone") memory.base.release();
  else memory.memory[Symbol.dispose]();
}
