/**
 * How long a simulated VMM and its guest take: log-normal, around medians that
 * were measured on QEMU without hardware virtualization (docs/benchmarks.md and
 * the agent's log of those runs).
 */
import { sleep } from "../sandbox-manager/clock.ts";
import type { Clock } from "../sandbox-manager/clock.ts";
import type { GuestOperation } from "../guest/simulated-guests.ts";
import type { VmmOperation } from "../vmm/simulated.ts";

export type SimulatedOperation = VmmOperation | GuestOperation;

interface Distribution {
  medianMs: number;
  /** Of the logarithm: 0.15 where the quartiles were a tenth from the median, more where the log showed more. */
  sigma: number;
}

export const MEASURED: Readonly<Record<SimulatedOperation, Distribution>> = {
  /** Kernel to envd's first answer: DESIGN says about 6 s. */
  boot: { medianMs: 6_000, sigma: 0.2 },
  /** A VMM that waits for a thaw. */
  spawn: { medianMs: 140, sigma: 0.3 },
  /** 13 to 40 ms. */
  thaw: { medianMs: 23, sigma: 0.35 },
  /** QMP `stop` drains the disk. */
  freeze: { medianMs: 6, sigma: 0.3 },
  /** A pause was 226 ms with 10 MiB dirty; nearly all of it is the layer. */
  "write-layer": { medianMs: 180, sigma: 0.15 },
  /** envd's `/init` on cold code: 320 ms and more. */
  init: { medianMs: 360, sigma: 0.2 },
  /** envd called directly: 58 ms. */
  exec: { medianMs: 58, sigma: 0.15 },
  file: { medianMs: 20, sigma: 0.3 },
};

/** One value of the distribution (Box–Muller takes two of `random`). */
export function drawMs(operation: SimulatedOperation, random: () => number): number {
  const { medianMs, sigma } = MEASURED[operation];
  const normal = Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());
  return medianMs * Math.exp(sigma * normal);
}

/** Waits as long as `operation` takes, on the given clock. */
export function passTime(
  clock: Clock,
  random: () => number,
): (operation: SimulatedOperation, signal: AbortSignal) => Promise<void> {
  return (operation, signal) => sleep(clock, drawMs(operation, random), signal);
}
