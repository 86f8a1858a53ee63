/**
 * The manager: accepts commands, in which order and whether at all; the
 * operations themselves are in operations.ts.
 *
 * Invariants: commands on one sandbox are serial, on different sandboxes
 * parallel within the work limit. A sandbox's highest generation is remembered
 * past its end; a lower one is refused, the same one joins or is answered.
 */
import { RookeryError } from "@rookery/protocol/errors";
import type { SandboxId, SnapshotId, WarmKey } from "../ids.ts";
import type { OperationKind, SnapshotRecord } from "../journal/records.ts";
import type { Places } from "../vm-pool/places.ts";
import { requireMemory, requireRoom } from "./capacity.ts";
import { notFound, repetitionOf, runCommand, staleGeneration, type AtWork } from "./commands.ts";
import { envdTargetOf, persist, requirePhase, SandboxEntry, type Core } from "./core.ts";
import { expiresAtMs } from "./expiry.ts";
import { randomHex } from "./new-ids.ts";
import { forAll, pauseAll, type PausedAll } from "./for-all.ts";
import { outlinedPhase, requireNotHeld } from "./holding.ts";
import { create, destroy, goOn, hold, pause, resume, snapshot } from "./operations.ts";
import type {
  EnvdTarget,
  HostEventLog,
  Lifetime,
  Operation,
  SandboxOperations,
  SandboxSpec,
  SandboxView,
  SnapshotView,
} from "./sandbox.ts";
import { awaitRevival, endRevival, reviveGuest } from "./revive-guest.ts";
import { Snapshots, viewOfSnapshot } from "./snapshots.ts";
import { asRookeryError, IncompleteUndo } from "./steps.ts";
import { viewOfSandbox } from "./views.ts";
import type { WarmImage } from "./warm-images.ts";
import { keepInPool } from "./keep-in-pool.ts";
import { flattenLater, type Watches } from "./watches.ts";

export class SandboxManager implements SandboxOperations {
  readonly #core: Core;
  readonly #watches: Watches;
  readonly #snapshots: Snapshots;
  #closing = false;
  readonly #warming = new AbortController();
  #warmed: Promise<void> = Promise.resolve();

  constructor(core: Core, watches: Watches) {
    this.#core = core;
    this.#watches = watches;
    this.#snapshots = new Snapshots(core);
  }

  get events(): HostEventLog {
    return this.#core.events;
  }

  /** Where warm images are built too: their VMs need places like all others. */
  get places(): Places {
    return this.#core.pool.places;
  }

  /**
   * Fills the pool, in the background: a first warm image takes a while, and
   * sandboxes that are here want commands.
   */
  warmPool(): void {
    const { warmImages, config, logger } = this.#core.deps;
    const { image, shape, size } = config.pool;
    if (size === 0) return;
    this.#warmed = warmImages.ensure(image, shape, this.#warming.signal).then(
      (warm) => keepInPool(this.#core, image, warm),
      (cause: unknown) => logger.warn({ err: cause }, "no warm image for the pool yet"),
    );
  }

  /** In the background: a former agent may not have got through. */
  startUploads(): void {
    this.#snapshots.startUploads();
  }

  /** Warm images that a sandbox, a snapshot or the pool cannot do without. */
  warmKeysInUse(): Set<WarmKey> {
    const { sandboxes, snapshots, pool } = this.#core;
    return new Set([
      ...[...sandboxes.values()].flatMap(({ record }) => record.warmKey ?? []),
      ...[...snapshots.values()].map(({ warmKey }) => warmKey),
      ...(pool.keptKey === undefined ? [] : [pool.keptKey]),
    ]);
  }

  async create(spec: SandboxSpec, operation: Operation): Promise<SandboxView> {
    const core = this.#core;
    this.#requireOpen(operation);
    const existing = core.sandboxes.get(spec.id);
    if (existing !== undefined) {
      return await (repetitionOf(core, existing, "create", operation) ?? Promise.reject(alreadyExists()));
    }
    this.#refuseDead(operation);
    requireRoom(core);
    requireMemory(core, spec.memoryMb);
    const nowMs = core.deps.clock.nowMs();
    const entry = new SandboxEntry(
      {
        version: 1,
        spec: { ...spec, env: { ...spec.env } },
        machineId: randomHex(core.deps, 16),
        createdAtMs: nowMs,
        bootId: core.deps.host.bootId,
        generation: operation.generation,
        phase: "starting",
        startedAtMs: nowMs,
        lifetimeSinceMs: nowMs,
      },
      { maxQueued: core.deps.config.maxQueuedPerSandbox, nowMs },
    );
    core.sandboxes.set(spec.id, entry);
    return await runCommand(
      core,
      entry,
      "create",
      operation,
      async (signal, atWork) => {
        using source = await this.#sourceOf(spec, signal);
        // Not a clone: this sandbox, which was paused on another host, goes on here.
        const { sourceSandboxId, machineId } = source.snapshot ?? {};
        if (sourceSandboxId === spec.id && machineId !== undefined) entry.set({ machineId });
        await atWork(() => create(core, entry, source, signal));
      },
      (error) => this.#buryFailedCreate(entry, operation, error),
    );
  }

  async destroy(operation: Operation): Promise<void> {
    const core = this.#core;
    const entry = core.sandboxes.get(operation.sandboxId);
    this.#requireOpen(operation);
    if (entry === undefined) {
      // A create that comes late must not bring it up.
      const { sandboxId: id, generation } = operation;
      await core.tombstones.add({ id, generation, destroyedAtMs: core.deps.clock.nowMs() });
      return;
    }
    const repeated = repetitionOf(core, entry, "destroy", operation);
    if (repeated !== undefined) {
      await repeated;
      return;
    }
    entry.underWay?.abort.abort(
      new RookeryError("wrong_state", "the sandbox was destroyed meanwhile", {
        details: { status: "stopping" },
      }),
    );
    await runCommand(core, entry, "destroy", operation, (_signal, atWork) =>
      atWork(() => destroy(core, entry)),
    );
  }

  async pause(operation: Operation): Promise<SandboxView> {
    return await this.#changeState("pause", operation, async (entry, signal, atWork) => {
      await atWork(() => pause(this.#core, entry, undefined, signal));
      flattenLater(this.#core, entry);
    });
  }

  async resume(operation: Operation, lifetime?: Lifetime): Promise<SandboxView> {
    return await this.#changeState("resume", operation, (entry, signal, atWork) =>
      atWork(() => resume(this.#core, entry, lifetime, signal)),
    );
  }

  async update(id: SandboxId, lifetime: Lifetime): Promise<SandboxView> {
    const core = this.#core;
    const entry = this.#entry(id);
    return await entry.queue.run(async () => {
      requirePhase(this.#entry(id), ["running", "paused"], "changed");
      const nowMs = core.deps.clock.nowMs();
      entry.lastActivityMs = nowMs;
      const { spec, lifetimeSinceMs } = entry.record;
      entry.set({ spec: { ...spec, lifetime }, lifetimeSinceMs: nowMs });
      try {
        await persist(core, entry, { durable: entry.phase === "paused" });
      } catch (cause) {
        // Not all of the record: a command may have been accepted meanwhile.
        entry.set({ spec, lifetimeSinceMs });
        throw cause;
      }
      return await viewOfSandbox(core, entry);
    });
  }

  async ping(id: SandboxId): Promise<number> {
    const entry = this.#entry(id);
    requirePhase(entry, ["running"], "pinged");
    requireNotHeld(entry, "pinged");
    const nowMs = this.#core.deps.clock.nowMs();
    entry.lastActivityMs = nowMs;
    return expiresAtMs(entry, nowMs);
  }

  async get(id: SandboxId): Promise<SandboxView> {
    return await viewOfSandbox(this.#core, this.#entry(id));
  }

  /** What a heartbeat tells of all sandboxes: from memory alone, however many there are. */
  outline(): Pick<SandboxView, "id" | "phase" | "generation">[] {
    return Array.from(this.#core.sandboxes.values(), ({ id, record }) => ({
      id,
      phase: outlinedPhase(record),
      generation: record.generation,
    }));
  }

  async list(options: {
    after?: SandboxId;
    limit: number;
  }): Promise<{ items: SandboxView[]; more: boolean }> {
    const { after } = options;
    const ids = [...this.#core.sandboxes.keys()].filter((id) => after === undefined || id > after).sort();
    const page = ids.slice(0, options.limit).flatMap((id) => this.#core.sandboxes.get(id) ?? []);
    const items = await Promise.all(page.map((entry) => viewOfSandbox(this.#core, entry)));
    return { items, more: ids.length > page.length };
  }

  async createSnapshot(operation: Operation, snapshotId: SnapshotId, teamId: string): Promise<SnapshotView> {
    this.#requireOpen(operation);
    return await this.#snapshots.make(snapshotId, operation, async () => {
      let made: SnapshotRecord | undefined;
      await this.#changeState("snapshot", operation, async (entry, signal, atWork) => {
        if (entry.record.spec.teamId !== teamId) throw notFound();
        made = await atWork(() => snapshot(this.#core, entry, { snapshotId, teamId }, signal));
      });
      return viewOfSnapshot(made!);
    });
  }

  async deleteSnapshot(snapshotId: SnapshotId): Promise<void> {
    await this.#snapshots.delete(snapshotId);
  }

  getSnapshots(ids: readonly SnapshotId[]): SnapshotView[] {
    return ids.flatMap((id) => {
      const record = this.#core.snapshots.get(id);
      return record === undefined ? [] : [viewOfSnapshot(record)];
    });
  }

  async withEnvd<T>(id: SandboxId, use: (target: EnvdTarget, signal: AbortSignal) => Promise<T>): Promise<T> {
    requirePhase(this.#entry(id), ["running"], "used");
    await awaitRevival(this.#core, this.#entry(id));
    const entry = this.#entry(id);
    requirePhase(entry, ["running"], "used");
    requireNotHeld(entry, "used");
    const { placed } = entry;
    if (placed === undefined) {
      throw new RookeryError("unavailable", `Sandbox ${id} is still being found again; try again shortly.`);
    }
    const controller = new AbortController();
    entry.uses.add(controller);
    try {
      return await use(envdTargetOf(entry, placed), controller.signal);
    } finally {
      entry.uses.delete(controller);
      entry.lastActivityMs = this.#core.deps.clock.nowMs();
    }
  }

  async reviveGuest(id: SandboxId): Promise<boolean> {
    const entry = this.#core.sandboxes.get(id);
    return entry !== undefined && !this.#closing && (await reviveGuest(this.#core, entry));
  }

  /**
   * Pauses all that run, within the work limit; those for whose pause the disk
   * has no room are stopped in memory. Goes on past failures, which it gives
   * back. Each is an event with this reason.
   */
  async pauseAll(why: { reason: string; message: string }): Promise<PausedAll> {
    return await pauseAll(this.#core, why);
  }

  async freeze(id: SandboxId): Promise<SandboxView> {
    const stranger = { sinceMs: this.#core.deps.clock.nowMs() };
    return await this.#ownWork(id, async (entry, signal) => {
      if (entry.record.stranger !== undefined) return;
      requirePhase(entry, ["running", "paused", "failed"], "frozen");
      if (entry.phase === "running") return await hold(this.#core, entry, { mark: { stranger }, signal });
      entry.set({ stranger });
      await persist(this.#core, entry, { durable: false });
    });
  }

  async thaw(id: SandboxId): Promise<SandboxView> {
    return await this.#ownWork(id, async (entry, signal) => {
      const { stranger, frozen } = entry.record;
      if (stranger === undefined) return;
      if (entry.phase === "running" && frozen === undefined) {
        return await goOn(this.#core, entry, { kind: "thaw" }, signal);
      }
      entry.set({ stranger: undefined });
      await persist(this.#core, entry, { durable: false });
    });
  }

  /** For `rookery down`. Goes on past failures, which it gives back. */
  async destroyAll(): Promise<{ id: SandboxId; error: RookeryError }[]> {
    for (const { underWay } of this.#core.sandboxes.values()) {
      underWay?.abort.abort(new RookeryError("unavailable", "the agent is going down"));
    }
    return await forAll(
      this.#core,
      () => true,
      (entry) => destroy(this.#core, entry),
    );
  }

  /** For a host that was deleted: what it has of snapshots too. Goes on past failures, which it gives back. */
  async destroyEverything(): Promise<{ id: string; error: RookeryError }[]> {
    const sandboxes = await this.destroyAll();
    return [...sandboxes, ...(await this.#snapshots.removeAllHere())];
  }

  /** Takes no more commands, finishes those at work, leaves VMs running. */
  async close(): Promise<void> {
    this.#closing = true;
    this.#watches.stop();
    this.#warming.abort(new RookeryError("unavailable", "the agent is stopping"));
    await this.#warmed;
    await Promise.all([...this.#core.sandboxes.values()].map((entry) => endRevival(entry)));
    await this.#snapshots.close();
    await Promise.all([...this.#core.sandboxes.values()].map(({ queue }) => queue.idle()));
    await this.#core.pool.close();
    await this.#core.events.close();
    await this.#core.tombstones.close();
  }

  /** Not a command: it bears no generation, and changes nothing that one decides. */
  async #ownWork(
    id: SandboxId,
    work: (entry: SandboxEntry, signal: AbortSignal) => Promise<void>,
  ): Promise<SandboxView> {
    const core = this.#core;
    if (this.#closing) throw new RookeryError("unavailable", "the agent is stopping");
    const entry = this.#entry(id);
    void endRevival(entry);
    return await entry.queue.run(async () => {
      if (core.sandboxes.get(id) !== entry) throw notFound();
      const signal = AbortSignal.timeout(core.deps.config.ownWorkTimeoutMs);
      try {
        await core.workLimit.run(() => work(entry, signal), signal);
      } catch (cause) {
        throw asRookeryError(cause, signal);
      }
      return await viewOfSandbox(core, entry);
    });
  }

  async #changeState(
    kind: OperationKind,
    operation: Operation,
    work: (entry: SandboxEntry, signal: AbortSignal, atWork: AtWork) => Promise<void>,
  ): Promise<SandboxView> {
    const core = this.#core;
    this.#requireOpen(operation);
    const entry = core.sandboxes.get(operation.sandboxId);
    if (entry === undefined) {
      this.#refuseDead(operation);
      throw notFound();
    }
    return await (repetitionOf(core, entry, kind, operation) ??
      runCommand(core, entry, kind, operation, (signal, atWork) => work(entry, signal, atWork)));
  }

  async #sourceOf(
    spec: SandboxSpec,
    signal: AbortSignal,
  ): Promise<{ warm: WarmImage; snapshot: SnapshotRecord | undefined } & Disposable> {
    const { warmImages } = this.#core.deps;
    if (spec.source.kind === "image") {
      const shape = { vcpus: spec.vcpus, memoryMb: spec.memoryMb };
      const warm = await warmImages.ensure(spec.source.name, shape, signal);
      keepInPool(this.#core, spec.source.name, warm);
      return { warm, snapshot: undefined, [Symbol.dispose]: () => undefined };
    }
    await this.#snapshots.bring(spec.source.snapshotId, signal);
    const use = this.#snapshots.use(spec.source.snapshotId, spec.teamId);
    try {
      const warm = await warmImages.open(use.record.warmKey, signal);
      if (warm === undefined) {
        throw new RookeryError("host_error", "the warm image that this snapshot stands on is gone");
      }
      return { warm, snapshot: use.record, [Symbol.dispose]: () => use[Symbol.dispose]() };
    } catch (cause) {
      use[Symbol.dispose]();
      throw cause;
    }
  }

  /** A sandbox that did not come to be: gone, save for its tombstone; or, where undo failed, on its way there. */
  async #buryFailedCreate(entry: SandboxEntry, operation: Operation, error: RookeryError): Promise<void> {
    const core = this.#core;
    const { generation } = entry.record;
    const last = {
      kind: "create" as const,
      generation: operation.generation,
      error: { code: error.code, message: error.message },
    };
    // A place that could not be taken away is the pool's, which tries again.
    const isUndone =
      !(error instanceof IncompleteUndo) || error.failures.every(({ step }) => step === "take-vm");
    if (!isUndone) {
      entry.set({ phase: "stopping", last });
      entry.unfinished = true;
      return;
    }
    try {
      await core.tombstones.add({ id: entry.id, generation, last, destroyedAtMs: core.deps.clock.nowMs() });
    } finally {
      core.sandboxes.delete(entry.id);
    }
  }

  #refuseDead(operation: Operation): void {
    const tombstone = this.#core.tombstones.get(operation.sandboxId);
    if (tombstone === undefined || operation.generation > tombstone.generation) return;
    const { last } = tombstone;
    if (
      operation.generation === tombstone.generation &&
      last?.error !== undefined &&
      last.kind === "create"
    ) {
      throw new RookeryError(last.error.code, last.error.message);
    }
    throw staleGeneration();
  }

  #requireOpen(operation: Operation): void {
    if (this.#closing) throw new RookeryError("unavailable", "the agent is stopping");
    if (operation.deadlineUnixMs <= this.#core.deps.clock.nowMs()) {
      throw new RookeryError("timeout", "the command came after its deadline");
    }
  }

  #entry(id: SandboxId): SandboxEntry {
    const entry = this.#core.sandboxes.get(id);
    if (entry === undefined) throw notFound();
    return entry;
  }
}

function alreadyExists(): RookeryError {
  return new RookeryError("already_exists", "a sandbox of this id is here already");
}
