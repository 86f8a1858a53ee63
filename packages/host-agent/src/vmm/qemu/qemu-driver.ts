/**
 * The `qemu` driver: KVM where it really works, else TCG.
 *
 * A VMM inherits all that it needs as descriptors (memory, streams, the control
 * socket, kernel and initrd); by name it only opens disk files in its run directory.
 */
import { createHash } from "node:crypto";
import { closeSync, constants, ftruncateSync, openSync } from "node:fs";
import { realpath, readFile, rm } from "node:fs/promises";
import { join } from "node:path";
import { RookeryError } from "@rookery/protocol/errors";
import { isLoadable, withTscRate } from "@rookery/protocol/memory-compat";
import { isErrno } from "../../host/errno.ts";
import { listenUnix } from "../../host/ffi.ts";
import { Memfd } from "../../host/memfd.ts";
import { isAlive } from "../../host/process.ts";
import { run } from "../../host/run.ts";
import { MemoryBases, memoryBytesOf } from "../memory/memory-base.ts";
import { mismatch } from "../memory/manifest.ts";
import { hostTscKhz } from "../tsc.ts";
import type { Vm, VmmDriver, VmmProbe, VmPlace, VmRecord } from "../vmm.ts";
import { probeAcceleration, type AccelerationVerdict } from "./acceleration.ts";
import { kernelCommandLine, qemuArguments, type Acceleration, type QemuMachine } from "./arguments.ts";
import { chainNodes, diskNode } from "./block-graph.ts";
import { launch, logFileOf, runDirAsSeen } from "./launcher.ts";
import { QemuProcess, qmpSocketOf } from "./qemu-process.ts";
import { QemuVm, releaseMemory, type GuestMemory } from "./qemu-vm.ts";
import { qemuRecordSchema, type QemuRecord } from "./record.ts";

export interface QemuDriverOptions {
  /** For the verdict on acceleration and the TSC's rate. */
  dataDir: string;
  /** Default: `qemu-system-x86_64` of the distribution. */
  program?: string;
  /** Default: what the probe finds. */
  acceleration?: Acceleration;
}

const DEFAULT_PROGRAM = "/usr/bin/qemu-system-x86_64";
const FIRST_GENERATION = 1;
/** Two guests that are tried out, each with a time-out of its own, on a busy host. */
const HOST_FACTS_TIMEOUT_MS = 60_000;

interface HostFacts {
  program: string;
  version: string;
  acceleration: Acceleration;
  tscKhz: number;
  fingerprint: string;
}

export function openQemuDriver(options: QemuDriverOptions): VmmDriver {
  const bases = new MemoryBases();
  const live = new Set<QemuProcess>();
  let facts: Promise<HostFacts> | undefined;

  /** Found once; after a failure, again. Not under the caller's signal: others may wait for the same. */
  const hostFacts = (signal: AbortSignal): Promise<HostFacts> => {
    facts ??= findHostFacts(options, AbortSignal.timeout(HOST_FACTS_TIMEOUT_MS)).catch((cause: unknown) => {
      facts = undefined;
      throw cause;
    });
    return unlessAborted(facts, signal);
  };

  const keep = (qemu: QemuProcess): void => {
    live.add(qemu);
    void qemu.exited.then(() => live.delete(qemu));
  };

  return {
    kind: "qemu",
    canForkRunning: true,

    async probe(signal): Promise<VmmProbe> {
      let program: string;
      let version: string;
      try {
        program = await findProgram(options);
        version = await readVersion(program, signal);
      } catch (cause) {
        signal.throwIfAborted();
        return { ok: false, reason: cause instanceof Error ? cause.message : String(cause) };
      }
      const verdict = await judge(options, program, version, signal);
      return {
        ok: verdict.acceleration !== undefined,
        acceleration: verdict.acceleration,
        version,
        // QEMU's documentation does not call TCG a security boundary. (docs/system/security.rst)
        secure: verdict.acceleration === "kvm",
        reason: verdict.reason,
      };
    },

    async fingerprint(signal) {
      return (await hostFacts(signal)).fingerprint;
    },

    async boot({ place, shape, boot, disk }, signal) {
      const host = await hostFacts(signal);
      const memory: GuestMemory = { kind: "booted", memory: Memfd.create("rookery-guest") };
      ftruncateSync(memory.memory.fd, memoryBytesOf(shape));
      const kernel = openSync(boot.kernel, constants.O_RDONLY);
      const initrd = openSync(boot.initrd, constants.O_RDONLY);
      try {
        const cmdline = kernelCommandLine(boot.cmdline, host.tscKhz);
        return await start({
          host,
          place,
          memory,
          machine: {
            acceleration: host.acceleration,
            shape,
            nic: place.nic,
            blockNodes: diskNodes(place, disk),
            start: { kind: "boot", cmdline },
          },
          bootFiles: [kernel, initrd],
          keep,
          signal,
        });
      } finally {
        closeSync(kernel);
        closeSync(initrd);
      }
    },

    async spawnClone({ place, base, disk }, signal) {
      const host = await hostFacts(signal);
      if (!isLoadable(base.fingerprint, host.fingerprint)) {
        throw mismatch("the warm image", "it was made by another VMM or on another CPU");
      }
      const memory: GuestMemory = { kind: "clone", base: await bases.acquire(base, signal) };
      return start({
        host,
        place,
        memory,
        machine: {
          acceleration: host.acceleration,
          shape: base.shape,
          nic: place.nic,
          blockNodes: diskNodes(place, disk),
          start: { kind: "clone" },
        },
        bootFiles: [],
        keep,
        signal,
      });
    },

    adopt: (place, record, signal) =>
      adopt({ bases, place, record, keep, drop: (qemu) => void live.delete(qemu) }, signal),

    async close() {
      await Promise.all([...live].map((qemu) => qemu.detach()));
      await bases.close();
    },
  };
}

function diskNodes(place: VmPlace, disk: Parameters<typeof chainNodes>[0]) {
  return [...chainNodes(disk, FIRST_GENERATION, runDirAsSeen(place)), diskNode(FIRST_GENERATION)];
}

interface StartOptions {
  host: HostFacts;
  place: VmPlace;
  /** Owned from now on. */
  memory: GuestMemory;
  machine: QemuMachine;
  bootFiles: readonly number[];
  keep(qemu: QemuProcess): void;
  signal: AbortSignal;
}

async function start(options: StartOptions): Promise<Vm> {
  const { host, place, memory, machine, signal } = options;
  const memoryFile = memory.kind === "clone" ? memory.base.memfd : memory.memory;
  const streams = Memfd.create("rookery-streams");
  try {
    await rm(qmpSocketOf(place), { force: true });
    const listener = listenUnix(qmpSocketOf(place));
    let launched;
    try {
      launched = await launch({
        place,
        program: host.program,
        programArguments: qemuArguments(machine),
        // In the order of VMM_FD.
        descriptors: [memoryFile.fd, streams.fd, streams.fd, listener, ...options.bootFiles],
        needsKvm: host.acceleration === "kvm",
        logFile: logFileOf(place),
      });
    } finally {
      // The VMM has its own: once that is closed too, connecting fails instead of waiting.
      closeSync(listener);
    }
    const facts: QemuRecord = {
      acceleration: host.acceleration,
      fingerprint: host.fingerprint,
      memory: memoryFile.identity,
      state: streams.identity,
      shape: machine.shape,
      ...(memory.kind === "clone"
        ? {
            base: {
              dir: memory.base.base.dir,
              memorySha256: memory.base.base.memorySha256,
              deviceStateSha256: memory.base.base.deviceStateSha256,
            },
          }
        : {}),
    };
    const record: VmRecord = { kind: "qemu", vmId: place.vmId, ...launched.identity, driver: { ...facts } };
    const qemu = await QemuProcess.connect(place, launched.identity, launched.child, signal);
    options.keep(qemu);
    try {
      await setCapabilities(qemu, signal);
      return new QemuVm(
        { qemu, record, facts, memory, streams },
        memory.kind === "clone" ? "waiting" : "running",
      );
    } catch (cause) {
      await qemu.kill();
      throw cause;
    }
  } catch (cause) {
    releaseMemory(memory);
    streams[Symbol.dispose]();
    throw cause;
  }
}

async function setCapabilities(qemu: QemuProcess, signal: AbortSignal): Promise<void> {
  const capabilities = [
    { capability: "x-ignore-shared" as const, state: true },
    { capability: "events" as const, state: true },
  ];
  await qemu.command("migrate-set-capabilities", { capabilities }, { signal });
}

interface AdoptOptions {
  bases: MemoryBases;
  place: VmPlace;
  record: VmRecord;
  keep(qemu: QemuProcess): void;
  drop(qemu: QemuProcess): void;
}

async function adopt(options: AdoptOptions, signal: AbortSignal): Promise<Vm | undefined> {
  const { bases, place, record } = options;
  const identity = { pid: record.pid, startTime: record.startTime };
  if (record.kind !== "qemu" || !(await isAlive(identity))) return undefined;
  const facts = qemuRecordSchema.parse(record.driver);
  const streams = await Memfd.openFromProcess(record.pid, facts.state);
  const memory = await adoptMemory(bases, record.pid, facts).catch((cause: unknown) => {
    streams?.[Symbol.dispose]();
    throw cause;
  });
  if (streams === undefined || memory === undefined) {
    streams?.[Symbol.dispose]();
    if (memory !== undefined) releaseMemory(memory);
    if (!(await isAlive(identity))) return undefined;
    throw new RookeryError(
      "host_error",
      "A VM's process no longer holds the files that it was started with.",
    );
  }
  let qemu: QemuProcess | undefined;
  try {
    qemu = await QemuProcess.connect(place, identity, undefined, signal);
    options.keep(qemu);
    const { status } = await qemu.command("query-status", {}, { signal });
    const hasEnded = status === "shutdown" || status === "guest-panicked" || status === "internal-error";
    if (hasEnded) await qemu.guestEnded(status === "shutdown" ? "guest-shutdown" : status);
    // Last: from here on the parts are the VM's.
    return new QemuVm({ qemu, record, facts, memory, streams }, hasEnded ? "running" : stateOf(status));
  } catch (cause) {
    // A connection that stayed would keep everybody else out, the next try too.
    if (qemu !== undefined) {
      options.drop(qemu);
      await qemu.detach();
    }
    streams[Symbol.dispose]();
    releaseMemory(memory);
    throw cause;
  }
}

function stateOf(status: string): "waiting" | "running" | "frozen" {
  if (status === "inmigrate") return "waiting";
  if (status === "running" || status === "io-error") return "running";
  // paused, save-vm, postmigrate: stopped by an agent.
  return "frozen";
}

async function adoptMemory(
  bases: MemoryBases,
  pid: number,
  facts: QemuRecord,
): Promise<GuestMemory | undefined> {
  if (facts.base === undefined) {
    const memory = await Memfd.openFromProcess(pid, facts.memory);
    return memory === undefined ? undefined : { kind: "booted", memory };
  }
  const base = { ...facts.base, shape: facts.shape, fingerprint: facts.fingerprint };
  const loaded = await bases.adopt(base, pid, facts.memory);
  return loaded === undefined ? undefined : { kind: "clone", base: loaded };
}

/** The outcome of `work`, which goes on without this caller when its signal aborts first. */
async function unlessAborted<T>(work: Promise<T>, signal: AbortSignal): Promise<T> {
  const left = Promise.withResolvers<never>();
  const leave = (): void => left.reject(signal.reason);
  signal.addEventListener("abort", leave, { once: true });
  if (signal.aborted) leave();
  try {
    return await Promise.race([work, left.promise]);
  } finally {
    signal.removeEventListener("abort", leave);
  }
}

// ── the host ────────────────────────────────────────────────────────────────

async function findProgram(options: QemuDriverOptions): Promise<string> {
  const wanted = options.program ?? DEFAULT_PROGRAM;
  try {
    return await realpath(wanted);
  } catch (cause) {
    if (!isErrno(cause, "ENOENT")) throw cause;
    throw new RookeryError("unavailable", "QEMU is not installed (Debian: package qemu-system-x86).", {
      cause,
    });
  }
}

async function readVersion(program: string, signal: AbortSignal): Promise<string> {
  const { stdout } = await run([program, "--version"], { signal });
  const match = /^QEMU emulator version (.{1,200})$/m.exec(stdout);
  if (match?.[1] === undefined) throw new Error("QEMU's version is not understood");
  return match[1];
}

function judge(
  options: QemuDriverOptions,
  program: string,
  version: string,
  signal: AbortSignal,
): Promise<AccelerationVerdict> {
  return probeAcceleration(
    { program, version, wanted: options.acceleration, cacheFile: join(options.dataDir, "vmm-probe.json") },
    signal,
  );
}

async function findHostFacts(options: QemuDriverOptions, signal: AbortSignal): Promise<HostFacts> {
  const program = await findProgram(options);
  const version = await readVersion(program, signal);
  const { acceleration, reason } = await judge(options, program, version, signal);
  if (acceleration === undefined) {
    throw new RookeryError("unavailable", `No virtual machine can run here: ${reason ?? "unknown"}.`);
  }
  const tscKhz = await hostTscKhz(join(options.dataDir, "tsc.json"), signal);
  const machine = { acceleration, shape: { vcpus: 1, memoryMb: 128 }, blockNodes: [] };
  const nic = { kind: "user" as const, mac: "", forwards: [] };
  const parts = [
    version,
    ...qemuArguments({ ...machine, nic, start: { kind: "clone" } }),
    ...qemuArguments({ ...machine, nic, start: { kind: "boot", cmdline: kernelCommandLine("", 0) } }),
    await cpuModel(),
  ];
  const digest = createHash("sha256").update(JSON.stringify(parts)).digest("hex");
  // Apart from the rest: it is measured, and never twice the same.
  const fingerprint = withTscRate(`qemu-${acceleration}-${digest}`, tscKhz);
  return { program, version, acceleration, tscKhz, fingerprint };
}

/** What the guest sees of the CPU follows from these lines; frequencies and counters are left out. */
async function cpuModel(): Promise<string> {
  const text = await readFile("/proc/cpuinfo", "utf8");
  const [first = ""] = text.split("\n\n");
  return first
    .split("\n")
    .filter((line) => /^(vendor_id|cpu family|model|model name|stepping|microcode|flags)\s*:/.test(line))
    .join("\n");
}
