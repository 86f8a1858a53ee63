/** Says how far a transfer of many megabytes has come, now and then. */
import type { Logger } from "../sandbox-manager/deps.ts";

const EVERY_MS = 5_000;

export interface ProgressLog {
  add(bytes: number): void;
  end(facts: Record<string, unknown>): void;
}

export function progressLog(
  logger: Logger,
  message: string,
  facts: { snapshotId: string; totalBytes: number },
): ProgressLog {
  const begin = performance.now();
  let [bytes, saidMs] = [0, begin];
  return {
    add(more) {
      bytes += more;
      const nowMs = performance.now();
      if (nowMs - saidMs < EVERY_MS) return;
      saidMs = nowMs;
      logger.info({ ...facts, bytes }, message);
    },
    end(more) {
      logger.info({ ...facts, ...more, ms: Math.round(performance.now() - begin) }, `${message}: done`);
    },
  };
}
