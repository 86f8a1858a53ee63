/**
 * Time, as a dependency: what waits here can be advanced by a test.
 */
export interface Clock {
  /** Wall clock, for deadlines and what people see. */
  nowMs(): number;
  /** Never goes back: for durations. */
  monotonicMs(): number;
  /** Calls `run` once after `delayMs`; dispose to call it off. Does not keep the process alive. */
  after(delayMs: number, run: () => void): Disposable;
}

export const systemClock: Clock = {
  nowMs: () => Date.now(),
  monotonicMs: () => performance.now(),
  after(delayMs, run) {
    // setTimeout takes 31 bits; a farther deadline is as good as none.
    const timer = setTimeout(run, Math.min(Math.max(delayMs, 0), 0x7fffffff));
    timer.unref();
    return { [Symbol.dispose]: () => clearTimeout(timer) };
  },
};

/** Resolves after `delayMs`, or rejects with the reason of `signal`. */
export async function sleep(clock: Clock, delayMs: number, signal: AbortSignal): Promise<void> {
  signal.throwIfAborted();
  const { promise, resolve, reject } = Promise.withResolvers<void>();
  const onAbort = () => reject(signal.reason as Error);
  using _timer = clock.after(delayMs, resolve);
  signal.addEventListener("abort", onAbort, { once: true });
  try {
    await promise;
  } finally {
    signal.removeEventListener("abort", onAbort);
  }
}

/** Aborts with `reason` after `delayMs`, or when one of `signals` does. */
export function deadlineSignal(
  clock: Clock,
  delayMs: number,
  reason: () => Error,
  signals: readonly AbortSignal[] = [],
): { signal: AbortSignal } & Disposable {
  const controller = new AbortController();
  const timer = clock.after(delayMs, () => controller.abort(reason()));
  return {
    signal: AbortSignal.any([controller.signal, ...signals]),
    [Symbol.dispose]: () => timer[Symbol.dispose](),
  };
}
