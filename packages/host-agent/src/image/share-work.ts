/**
 * Callers that ask for the same thing at the same time wait for one piece of
 * work. Each may leave by its own signal; when the last has left, the work is
 * aborted.
 */
interface Shared<T> {
  outcome: Promise<T>;
  waiting: number;
  abort: AbortController;
}

export function shareWork<T>(
  work: (key: string, signal: AbortSignal) => Promise<T>,
): (key: string, signal: AbortSignal) => Promise<T> {
  const running = new Map<string, Shared<T>>();

  return async (key, signal) => {
    signal.throwIfAborted();
    let shared = running.get(key);
    // Work that was given up undoes itself first; then it begins anew.
    while (shared?.abort.signal.aborted) {
      await shared.outcome.catch(() => undefined); // those who waited for it were told
      signal.throwIfAborted();
      shared = running.get(key);
    }
    if (shared === undefined) {
      const abort = new AbortController();
      const begun: Shared<T> = { abort, waiting: 0, outcome: work(key, abort.signal) };
      begun.outcome = begun.outcome.finally(() => running.delete(key));
      running.set(key, begun);
      shared = begun;
    }
    const { outcome, abort } = shared;
    shared.waiting += 1;
    const left = Promise.withResolvers<never>();
    const leave = (): void => {
      shared.waiting -= 1;
      if (shared.waiting === 0) abort.abort(signal.reason);
      left.reject(signal.reason);
    };
    signal.addEventListener("abort", leave, { once: true });
    try {
      return await Promise.race([outcome, left.promise]);
    } finally {
      signal.removeEventListener("abort", leave);
      // The last one sees the undoing through, so that what it leaves is as it was.
      // The work's own reason is no news: this caller's is on its way.
      if (abort.signal.aborted) await outcome.catch(() => undefined);
    }
  };
}
