/**
 * The pool: clones that are spawned and wait for a sandbox.
 *
 * Of the default warm image a constant number waits; a clone of any other is
 * spawned when it is asked for. A burst never makes the pool grow: whoever finds
 * it empty spawns its own. The refill runs in the background, bounded, and gives
 * way to operations.
 *
 * Invariant: a waiting clone belongs to the agent and not to a sandbox. No
 * sandbox's record names it, so a crash leaves nothing but what recovery removes.
 */
import { RookeryError } from "@rookery/protocol/errors";
import type { VmId, WarmKey } from "../ids.ts";
import type { Journal } from "../journal/journal.ts";
import type { VmPlaceRecord } from "../journal/records.ts";
import type { RootDisk } from "../root-disk/root-disk.ts";
import type { Deps } from "../sandbox-manager/deps.ts";
import type { WarmImage } from "../sandbox-manager/warm-images.ts";
import type { WorkLimit } from "../sandbox-manager/work-limit.ts";
import type { Vm } from "../vmm/vmm.ts";
import { placeOf, Places, type Place } from "./places.ts";

/** A VM in its place. */
export interface PlacedVm {
  vm: Vm;
  place: Place;
  /** The disk that it was spawned with; undefined once a sandbox took it, or for an adopted VM. */
  ownDisk: RootDisk | undefined;
}

const SPAWN_TIMEOUT_MS = 30_000;
const FIRST_BACK_OFF_MS = 1_000;
const LAST_BACK_OFF_MS = 60_000;
/** A clone that dies sooner than this was not worth spawning: the refill slows down. */
const SHORT_LIFE_MS = 10_000;

export class VmPool {
  readonly #deps: Deps;
  readonly #journal: Journal;
  readonly #workLimit: WorkLimit;
  readonly places: Places;
  readonly #waiting: PlacedVm[] = [];
  #target: { warm: WarmImage; size: number } | undefined;
  #spawning = 0;
  #failuresInARow = 0;
  #notBeforeMs = 0;
  #retryTimer: Disposable | undefined;
  readonly #closing = new AbortController();
  readonly #background = new Set<Promise<void>>();

  constructor(deps: Deps, journal: Journal, workLimit: WorkLimit) {
    this.#deps = deps;
    this.#journal = journal;
    this.#workLimit = workLimit;
    this.places = new Places(deps, journal);
  }

  get waitingCount(): number {
    return this.#waiting.length;
  }

  get keptKey(): WarmKey | undefined {
    return this.#target?.warm.key;
  }

  /** Keeps `size` clones of `warm` waiting from now on; those of another warm image go. */
  keep(warm: WarmImage, size: number): void {
    this.#target = { warm, size };
    for (const placed of this.#waiting.splice(0)) {
      if (placed.vm.state === "waiting" && placed.place.warmKey === warm.key) this.#waiting.push(placed);
      else this.#inBackground(this.discard(placed));
    }
    this.#refill();
  }

  /** A waiting clone of `warm`, from the pool or spawned for the caller, who owns it then. */
  async take(warm: WarmImage, signal: AbortSignal): Promise<PlacedVm> {
    const index = this.#waiting.findIndex(
      ({ vm, place }) => place.warmKey === warm.key && vm.state === "waiting",
    );
    if (index === -1) return await this.#spawn(warm, signal);
    const [placed] = this.#waiting.splice(index, 1);
    this.#refill();
    return placed!;
  }

  /** Ends a VM and takes its place away. Bears running twice. What fails is tried again in the background. */
  async discard(placed: PlacedVm): Promise<void> {
    await this.places.release(placed.place.record, { vm: placed.vm, disk: placed.ownDisk });
    placed.ownDisk = undefined;
  }

  /**
   * The disk that a clone was spawned with, when its sandbox brought another. Its
   * link in the run directory goes with the place: to detach it would take the
   * other disk's links too.
   */
  async dropOwnDisk(placed: PlacedVm): Promise<void> {
    if (placed.ownDisk === undefined) return;
    await this.#deps.rootDisk.remove(placed.ownDisk.dir);
    placed.ownDisk = undefined;
  }

  /** The live VM of a record that a former agent wrote, or undefined. */
  async adopt(record: VmPlaceRecord, signal: AbortSignal): Promise<PlacedVm | undefined> {
    if (record.process === undefined || record.bootId !== this.#deps.host.bootId) return undefined;
    const vmPlace = placeOf(record, []);
    const vm = await this.#deps.vmm.adopt(vmPlace, record.process, signal);
    if (vm === undefined) return undefined;
    return { vm, place: { vm: vmPlace, record, warmKey: undefined }, ownDisk: undefined };
  }

  /** Ends waiting clones. VMs that were taken go on. */
  async close(): Promise<void> {
    this.#closing.abort(new RookeryError("unavailable", "the agent is stopping"));
    this.#target = undefined;
    this.#retryTimer?.[Symbol.dispose]();
    for (const placed of this.#waiting.splice(0)) this.#inBackground(this.discard(placed));
    await Promise.all(this.#background);
  }

  async #spawn(warm: WarmImage, signal: AbortSignal): Promise<PlacedVm> {
    const { rootDisk, vmm } = this.#deps;
    const place = await this.places.make(warm.shape, signal);
    let vm: Vm | undefined;
    let disk: RootDisk | undefined;
    try {
      place.warmKey = warm.key;
      disk = await rootDisk.create(
        { dir: this.#journal.vmDiskDir(place.vm.vmId), chain: warm.diskChain, sizeBytes: warm.diskSizeBytes },
        signal,
      );
      const attachment = await rootDisk.attach(disk, place.record, signal);
      vm = await vmm.spawnClone({ place: place.vm, base: warm.base, disk: attachment }, signal);
      await this.places.recordProcess(place, vm);
      return { vm, place, ownDisk: disk };
    } catch (cause) {
      // What the undo cannot do is logged there and tried again; the first error counts.
      await this.places.release(place.record, { vm, disk }).catch(() => undefined);
      throw cause;
    }
  }

  #refill(): void {
    const target = this.#target;
    if (target === undefined || this.#closing.signal.aborted) return;
    const waitMs = this.#notBeforeMs - this.#deps.clock.monotonicMs();
    if (waitMs > 0) {
      this.#retryTimer?.[Symbol.dispose]();
      this.#retryTimer = this.#deps.clock.after(waitMs, () => this.#refill());
      return;
    }
    const { refillConcurrency } = this.#deps.config.pool;
    while (this.#spawning < refillConcurrency && this.#waiting.length + this.#spawning < target.size) {
      this.#spawning += 1;
      this.#inBackground(this.#refillOne(target.warm));
    }
  }

  async #refillOne(warm: WarmImage): Promise<void> {
    const { clock, config, logger } = this.#deps;
    try {
      await this.#workLimit.whenQuiet(config.pool.refillYieldMs);
      const limit = AbortSignal.any([this.#closing.signal, AbortSignal.timeout(SPAWN_TIMEOUT_MS)]);
      const placed = await this.#spawn(warm, limit);
      if (this.#target?.warm.key !== warm.key) {
        await this.discard(placed);
        return;
      }
      this.#waiting.push(placed);
      this.#watch(placed, clock.monotonicMs());
    } catch (cause) {
      if (!this.#closing.signal.aborted) {
        logger.warn({ err: cause }, "the pool could not be refilled");
        this.#backOff();
      }
    } finally {
      this.#spawning -= 1;
      this.#refill();
    }
  }

  /** A waiting clone that dies is replaced. */
  #watch(placed: PlacedVm, bornMs: number): void {
    void placed.vm.exited.then((exit) => {
      const index = this.#waiting.indexOf(placed);
      if (index === -1) return; // taken, or discarded by us
      this.#waiting.splice(index, 1);
      const { clock, logger } = this.#deps;
      logger.warn({ vmId: placed.place.record.vmId, exit }, "a waiting clone died");
      if (clock.monotonicMs() - bornMs < SHORT_LIFE_MS) this.#backOff();
      this.#inBackground(this.discard(placed));
      this.#refill();
    });
  }

  #backOff(): void {
    const nowMs = this.#deps.clock.monotonicMs();
    if (nowMs - this.#notBeforeMs > LAST_BACK_OFF_MS) this.#failuresInARow = 0;
    const waitMs = Math.min(FIRST_BACK_OFF_MS * 2 ** this.#failuresInARow, LAST_BACK_OFF_MS);
    this.#failuresInARow += 1;
    this.#notBeforeMs = nowMs + waitMs;
  }

  /** `close` waits for it. Failures of places are logged and tried again by `Places`. */
  #inBackground(work: Promise<void>): void {
    const settled = work
      .catch((cause: unknown) => {
        this.#deps.logger.warn({ err: cause }, "background work of the pool failed");
      })
      .finally(() => this.#background.delete(settled));
    this.#background.add(settled);
  }

  /** For tests and `doctor`: VM ids that wait here. */
  waitingIds(): VmId[] {
    return this.#waiting.map(({ place }) => place.record.vmId);
  }
}
