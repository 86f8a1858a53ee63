/**
 * How every benchmark measures: product and floor take turns in one run, at
 * least seven times each, and medians are compared. One JSON line comes out.
 */

export interface Measurement {
  name: string;
  value: number;
  unit: string;
  floor: number;
  /** Cost over floor: lower is better. Throughputs are turned round. */
  ratio: number;
  runs: number;
  /** Interquartile range of the product's values over their median. */
  spread: number;
}

export interface Contest {
  name: string;
  unit: string;
  /** Larger values are better: MB/s, calls/s. */
  isThroughput?: boolean;
  runs?: number;
  product: () => Promise<number>;
  floor: () => Promise<number>;
}

export async function contest(options: Contest): Promise<Measurement> {
  const runs = Math.max(options.runs ?? 9, 7);
  const values: number[] = [];
  const floors: number[] = [];
  // The first round of each warms caches up and is not counted.
  for (let round = 0; round <= runs; round += 1) {
    const floor = await options.floor();
    const value = await options.product();
    // On stderr: a long run shows where it is, and one that is cut off shows what it saw.
    console.error(
      `${options.name} ${round}/${runs}: floor ${round3(floor)}, product ${round3(value)} ${options.unit}`,
    );
    if (round === 0) continue;
    floors.push(floor);
    values.push(value);
  }
  const value = median(values);
  const floor = median(floors);
  return {
    name: options.name,
    value: round3(value),
    unit: options.unit,
    floor: round3(floor),
    ratio: round3(options.isThroughput ? floor / value : value / floor),
    runs,
    spread: round3((quantile(values, 0.75) - quantile(values, 0.25)) / value),
  };
}

export function print(measurement: Measurement): void {
  console.log(JSON.stringify(measurement));
}

/** Milliseconds that `work` takes. */
export async function timed(work: () => Promise<unknown>): Promise<number> {
  const begun = performance.now();
  await work();
  return performance.now() - begun;
}

export function median(values: readonly number[]): number {
  return quantile(values, 0.5);
}

/** Between the values where `q` falls between two. */
export function quantile(values: readonly number[], q: number): number {
  const sorted = values.toSorted((a, b) => a - b);
  const at = (sorted.length - 1) * q;
  const low = sorted[Math.floor(at)];
  const high = sorted[Math.ceil(at)];
  if (low === undefined || high === undefined) throw new Error("no values to take a quantile of");
  return low + (high - low) * (at - Math.floor(at));
}

function round3(value: number): number {
  return Math.round(value * 1000) / 1000;
}
