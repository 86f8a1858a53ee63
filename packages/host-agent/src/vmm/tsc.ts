/**
 * The rate of this host's time stamp counter.
 *
 * A guest is told it as `tsc_early_khz`, for its own calibration against an
 * emulated timer fails under load. KVM and TCG alike hand the host's counter to
 * the guest (QEMU's TCG reads it by RDTSC and adds an offset), so what counts
 * is how fast RDTSC runs here, which is measured: `cpu MHz` of /proc/cpuinfo is
 * the present frequency of a core, and the kernel's log may be gone.
 *
 * Two measurements differ by some parts per million, and a warm image is good
 * for one rate only. So the first one is kept in a file, for as long as new
 * ones confirm it.
 */
import { setTimeout as delay } from "node:timers/promises";
import { TSC_TOLERANCE } from "@rookery/protocol/memory-compat";
import { z } from "zod";
import { readJson, writeFileAtomic } from "../host/atomic-file.ts";
import { isErrno } from "../host/errno.ts";
import { machineCodeFunction, monotonicRawNs } from "../host/ffi.ts";

/** rdtsc; shl rdx, 32; or rax, rdx; ret */
const RDTSC = Uint8Array.of(0x0f, 0x31, 0x48, 0xc1, 0xe2, 0x20, 0x48, 0x09, 0xd0, 0xc3);
/** Two instants 80 ms apart, each known to about 0.5 µs: within 10 parts per million. */
const MEASURE_MS = 80;
const INSTANT_TRIES = 64;
const keptSchema = z.object({ tscKhz: z.number().int().positive() });

/** One instant on both clocks: the try in which reading took the fewest ticks. */
function readInstant(rdtsc: () => bigint): { ticks: bigint; ns: bigint } {
  let best: { width: bigint; ticks: bigint; ns: bigint } | undefined;
  for (let attempt = 0; attempt < INSTANT_TRIES; attempt += 1) {
    const before = rdtsc();
    const ns = monotonicRawNs();
    const after = rdtsc();
    const width = after - before;
    if (best === undefined || width < best.width) best = { width, ticks: before + width / 2n, ns };
  }
  if (best === undefined) throw new Error("unreachable: there is at least one try");
  return best;
}

export async function measureTscKhz(signal: AbortSignal): Promise<number> {
  if (process.arch !== "x64") throw new Error(`${process.arch} has no time stamp counter`);
  const rdtsc = machineCodeFunction(RDTSC);
  const begin = readInstant(rdtsc);
  await delay(MEASURE_MS, undefined, { signal });
  const end = readInstant(rdtsc);
  return Math.round((Number(end.ticks - begin.ticks) * 1e6) / Number(end.ns - begin.ns));
}

/** This host's rate; the one in `file` where the counter still runs at it. */
export async function hostTscKhz(file: string, signal: AbortSignal): Promise<number> {
  const measured = await measureTscKhz(signal);
  let kept: number | undefined;
  try {
    kept = (await readJson(file, keptSchema)).tscKhz;
  } catch (cause) {
    if (!isErrno(cause, "ENOENT")) throw cause;
  }
  if (kept !== undefined && Math.abs(kept - measured) <= measured * TSC_TOLERANCE) return kept;
  await writeFileAtomic(file, `${JSON.stringify({ tscKhz: measured })}\n`);
  return measured;
}
