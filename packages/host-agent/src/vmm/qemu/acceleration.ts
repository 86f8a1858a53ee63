/**
 * Which acceleration really works on this host, found by running a guest.
 *
 * An openable /dev/kvm proves nothing: there are hosts where it opens and makes
 * VMs that never run, or that run one emulated instruction at a time. The
 * verdict is kept for the present boot of the host and version of QEMU.
 */
import { constants } from "node:fs";
import { access, mkdir, mkdtemp, readFile, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import { z } from "zod";
import { readJson, removeTree, writeFileAtomic } from "../../host/atomic-file.ts";
import { run } from "../../host/run.ts";
import type { Acceleration } from "./arguments.ts";
import { PROBE_EXIT_CODE, PROBE_EXIT_PORT, probeBios } from "./probe-guest.ts";

/** The guest takes 0.3 s under TCG; one that is emulated instruction by instruction, minutes. */
const PROBE_TIMEOUT_MS = 10_000;

const verdictSchema = z.object({
  bootId: z.string(),
  program: z.string(),
  version: z.string(),
  wanted: z.enum(["kvm", "tcg"]).optional(),
  acceleration: z.enum(["kvm", "tcg"]).optional(),
  reason: z.string().optional(),
});

export interface AccelerationVerdict {
  /** Undefined: no guest runs here. */
  acceleration?: Acceleration;
  /** Why not KVM, or why nothing. */
  reason?: string;
}

export interface AccelerationQuestion {
  program: string;
  version: string;
  /** Only this one is tried. */
  wanted?: Acceleration;
  cacheFile: string;
}

export async function probeAcceleration(
  question: AccelerationQuestion,
  signal: AbortSignal,
): Promise<AccelerationVerdict> {
  const { program, version, wanted, cacheFile } = question;
  const bootId = (await readFile("/proc/sys/kernel/random/boot_id", "utf8")).trim();
  const asked = { bootId, program, version, wanted };
  // A file that is missing or not ours only means that the question is asked again.
  const known = await readJson(cacheFile, verdictSchema).catch(() => undefined);
  if (
    known !== undefined &&
    known.bootId === bootId &&
    known.program === program &&
    known.version === version &&
    known.wanted === wanted
  ) {
    return { acceleration: known.acceleration, reason: known.reason };
  }
  const verdict = await judge(question, signal);
  await mkdir(dirname(cacheFile), { recursive: true });
  await writeFileAtomic(cacheFile, `${JSON.stringify({ ...asked, ...verdict })}\n`);
  return verdict;
}

async function judge(question: AccelerationQuestion, signal: AbortSignal): Promise<AccelerationVerdict> {
  const { wanted } = question;
  const why: string[] = [];
  if (wanted !== "tcg") {
    const reason = await whyNotKvm(question, signal);
    if (reason === undefined) return { acceleration: "kvm" };
    why.push(`KVM: ${reason}`);
    if (wanted === "kvm") return { reason: why.join("; ") };
  }
  const reason = await whyNot("tcg", question, signal);
  if (reason === undefined) return { acceleration: "tcg", reason: why.join("; ") || undefined };
  why.push(`TCG: ${reason}`);
  return { reason: why.join("; ") };
}

async function whyNotKvm(question: AccelerationQuestion, signal: AbortSignal): Promise<string | undefined> {
  try {
    await access("/dev/kvm", constants.R_OK | constants.W_OK);
  } catch (cause) {
    return `/dev/kvm cannot be used (${cause instanceof Error && "code" in cause ? String(cause.code) : "unknown"})`;
  }
  return whyNot("kvm", question, signal);
}

/** Runs the guest. Undefined: it came to its end. */
async function whyNot(
  acceleration: Acceleration,
  { program, cacheFile }: AccelerationQuestion,
  signal: AbortSignal,
): Promise<string | undefined> {
  await mkdir(dirname(cacheFile), { recursive: true });
  const dir = await mkdtemp(join(dirname(cacheFile), ".vmm-probe-"));
  try {
    const bios = join(dir, "bios.bin");
    await writeFile(bios, probeBios());
    await run(
      [
        program,
        ...["-M", "microvm", "-accel", acceleration, "-cpu", acceleration === "kvm" ? "host" : "max"],
        ...["-m", "32M", "-nodefaults", "-no-user-config", "-display", "none"],
        ...["-bios", bios, "-device", `isa-debug-exit,iobase=${PROBE_EXIT_PORT},iosize=1`],
      ],
      { signal, timeoutMs: PROBE_TIMEOUT_MS, okExitCodes: [PROBE_EXIT_CODE] },
    );
    return undefined;
  } catch (cause) {
    signal.throwIfAborted();
    return cause instanceof Error ? cause.message.slice(0, 500) : String(cause);
  } finally {
    await removeTree(dir);
  }
}
