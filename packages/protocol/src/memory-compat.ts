/**
 * Can a host load a memory that another one froze? Everything that must be
 * equal is in one text; only the rate of the time stamp counter may differ, by
 * as much as two measurements of one machine do: `TEXT-tscKHZ`.
 */

/** A guest's clock is set at each restore; in between it may run wrong by so much. */
export const TSC_TOLERANCE = 100e-6;

export function withTscRate(text: string, tscKhz: number): string {
  return `${text}-tsc${tscKhz}`;
}

/** The text, and what ends it: `undefined` where no rate is in it. */
export function splitTscRate(compat: string): { text: string; tscKhz: number | undefined } {
  const match = /^(.*)-tsc(\d{1,12})$/s.exec(compat);
  if (match === null) return { text: compat, tscKhz: undefined };
  return { text: match[1]!, tscKhz: Number(match[2]) };
}

export function isLoadable(frozen: string, here: string): boolean {
  const [a, b] = [splitTscRate(frozen), splitTscRate(here)];
  if (a.text !== b.text) return false;
  if (a.tscKhz === undefined || b.tscKhz === undefined) return a.tscKhz === b.tscKhz;
  return Math.abs(a.tscKhz - b.tscKhz) <= a.tscKhz * TSC_TOLERANCE;
}
