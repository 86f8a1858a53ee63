/**
 * Sends snapshots to the object store, one after the other, in the background.
 *
 * Which are still to be sent is in their records (`storeId` is absent), so a
 * crash at any line is gone on with at the next start. A store that is away is
 * tried again for as long as it takes.
 */
import type { SnapshotId } from "../ids.ts";
import type { SnapshotRecord } from "../journal/records.ts";
import { sleep } from "./clock.ts";
import type { Core } from "./core.ts";

const FIRST_PAUSE_MS = 2_000;
const LONGEST_PAUSE_MS = 300_000;

/** Keeps a snapshot's files during the work; nothing is done when it is gone. */
type Holding = (id: SnapshotId, work: (record: SnapshotRecord) => Promise<void>) => Promise<void>;

export class SnapshotUploads {
  readonly #core: Core;
  readonly #holding: Holding;
  readonly #waiting = new Set<SnapshotId>();
  readonly #stop = new AbortController();
  #sending: { id: SnapshotId; abort: AbortController; done: Promise<void> } | undefined;
  #wake: () => void = () => undefined;
  #running: Promise<void> = Promise.resolve();
  #failures = 0;
  #sweepDueMs = 0;

  constructor(core: Core, holding: Holding) {
    this.#core = core;
    this.#holding = holding;
  }

  start(): void {
    const { snapshotStore } = this.#core.deps;
    if (snapshotStore === undefined) return;
    for (const { id, storeId } of this.#core.snapshots.values()) {
      if (storeId === undefined) this.#waiting.add(id);
    }
    this.#running = this.#run();
  }

  add(id: SnapshotId): void {
    const record = this.#core.snapshots.get(id);
    if (this.#core.deps.snapshotStore === undefined || record?.storeId !== undefined) return;
    this.#waiting.add(id);
    this.#wake();
  }

  /** When it resolves nothing more of this snapshot is sent or written. */
  async drop(id: SnapshotId): Promise<void> {
    this.#waiting.delete(id);
    if (this.#sending?.id !== id) return;
    this.#sending.abort.abort(new Error("the snapshot is deleted"));
    await this.#sending.done;
  }

  async close(): Promise<void> {
    this.#stop.abort(new Error("the agent is stopping"));
    this.#wake();
    await this.#running;
  }

  async #run(): Promise<void> {
    const { signal } = this.#stop;
    while (!signal.aborted) {
      const [id] = this.#waiting;
      if (id !== undefined) await this.#sendOrLog(id);
      else await this.#sweepOrLog();
      if (signal.aborted) return;
      if (this.#waiting.size === 0) await this.#untilWork();
      else if (this.#failures > 0) await this.#pause();
    }
  }

  async #sendOrLog(id: SnapshotId): Promise<void> {
    const { logger } = this.#core.deps;
    const abort = new AbortController();
    const { promise, resolve } = Promise.withResolvers<void>();
    this.#sending = { id, abort, done: promise };
    try {
      await this.#send(id, AbortSignal.any([abort.signal, this.#stop.signal]));
      this.#waiting.delete(id);
      this.#failures = 0;
    } catch (cause) {
      // To the end of the queue: the next one may get through.
      if (this.#waiting.delete(id) && !abort.signal.aborted) this.#waiting.add(id);
      if (abort.signal.aborted || this.#stop.signal.aborted) return;
      this.#failures += 1;
      logger.warn({ snapshotId: id, err: cause }, "a snapshot could not be sent to the object store yet");
    } finally {
      this.#sending = undefined;
      resolve();
    }
  }

  async #send(id: SnapshotId, signal: AbortSignal): Promise<void> {
    const { journal, snapshots, deps } = this.#core;
    await this.#holding(id, async (record) => {
      const storeId = await deps.snapshotStore!.send(record, journal.snapshotLayerDir(id), signal);
      signal.throwIfAborted();
      const stored = { ...record, storeId };
      await journal.writeSnapshot(stored);
      snapshots.set(id, stored);
    });
  }

  async #sweepOrLog(): Promise<void> {
    const { deps, sandboxes, snapshots } = this.#core;
    if (deps.clock.nowMs() < this.#sweepDueMs) return;
    this.#sweepDueMs = deps.clock.nowMs() + deps.config.storeSweepIntervalMs;
    try {
      const chains = [
        ...[...sandboxes.values()].flatMap(({ disk }) => disk?.chain ?? []),
        ...[...snapshots.values()].flatMap(({ chain }) => chain),
      ];
      await deps.snapshotStore!.sweepImages(new Set(chains.map(({ path }) => path)));
      await deps.snapshotStore!.sweep(this.#stop.signal);
    } catch (cause) {
      if (!this.#stop.signal.aborted) deps.logger.warn({ err: cause }, "the object store was not swept");
    }
  }

  async #untilWork(): Promise<void> {
    const { clock } = this.#core.deps;
    const { promise, resolve } = Promise.withResolvers<void>();
    this.#wake = resolve;
    using _sweep = clock.after(Math.max(this.#sweepDueMs - clock.nowMs(), 0), resolve);
    if (this.#waiting.size > 0 || this.#stop.signal.aborted) return;
    await promise;
  }

  async #pause(): Promise<void> {
    const ms = Math.min(FIRST_PAUSE_MS * 2 ** (this.#failures - 1), LONGEST_PAUSE_MS);
    await sleep(this.#core.deps.clock, ms, this.#stop.signal).catch(() => undefined); // stopped
  }
}
