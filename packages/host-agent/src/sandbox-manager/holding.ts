/**
 * Holding: a guest that is stopped in memory, its VM kept. It uses no CPU,
 * does not expire, and takes no calls; to all others it is paused.
 *
 * Two reasons, each a mark in the record: `frozen`, when there was no room on
 * the disk for a pause, and `stranger`, when the control plane has no row of
 * it. Either is enough, and the guest goes on when neither is left, by an
 * ordinary resume or a thaw; a pause takes both marks away.
 *
 * Invariant: a running record with a mark means a guest that is not to run, and
 * whoever finds it running stops it (recovery, the janitor). So going on is
 * written down last: a crash before that line, and it is held again.
 */
import { RookeryError } from "@rookery/protocol/errors";
import type { SandboxRecord } from "../journal/records.ts";
import { persist, reportPendingEvent, type Core, type SandboxEntry } from "./core.ts";
import type { Lifetime, SandboxPhase } from "./sandbox.ts";
import { startGuest } from "./start-guest.ts";
import type { Step } from "./steps.ts";

export type HoldMark = Pick<SandboxRecord, "frozen" | "stranger">;

/** Is its guest not to run, whatever is being done with it? */
export function hasMark({ frozen, stranger }: HoldMark): boolean {
  return frozen !== undefined || stranger !== undefined;
}

/** Is its guest stopped in memory? */
export function isHeld(record: SandboxRecord): boolean {
  return record.phase === "running" && hasMark(record);
}

/** What all others see. */
export function shownPhase(record: SandboxRecord): SandboxPhase {
  return isHeld(record) ? "paused" : record.phase;
}

/**
 * The same in a heartbeat's digest, save for a stranger: for as long as it is
 * one it makes a difference to whatever rows there are, and no row that counts
 * there is `failed`. So the control plane looks, and thaws it when it has a row.
 */
export function outlinedPhase(record: SandboxRecord): SandboxPhase {
  return record.stranger === undefined ? shownPhase(record) : "failed";
}

/** For what needs a guest that runs. */
export function requireNotHeld({ record }: SandboxEntry, what: string): void {
  if (!isHeld(record)) return;
  throw new RookeryError("wrong_state", `a sandbox that is paused cannot be ${what}`, {
    details: { status: "paused" },
  });
}

export interface HoldContext {
  core: Core;
  entry: SandboxEntry;
  mark: HoldMark;
  /** When the control plane is to hear of it. */
  event: SandboxRecord["pendingEvent"];
  /** Better stopped without a word in the journal than running: the disk may be full. */
  whateverTheJournalSays: boolean;
  before: HoldMark;
}

export const holdSteps: readonly Step<HoldContext>[] = [
  {
    name: "freeze",
    async run({ entry }, signal) {
      await stopGuest(entry, signal);
    },
    async undo({ entry, before }, signal) {
      if (hasMark(before)) return;
      if (entry.placed!.vm.state === "frozen") await entry.placed!.vm.unfreeze(signal);
    },
  },
  {
    name: "journal-held",
    async run({ core, entry, mark, event, whateverTheJournalSays }) {
      entry.set({ ...mark, ...(event !== undefined && { pendingEvent: event }) });
      try {
        await persist(core, entry, { durable: false });
        await reportPendingEvent(core, entry);
        if (event !== undefined) await persist(core, entry, { durable: false });
      } catch (cause) {
        if (!whateverTheJournalSays) throw cause;
        entry.unfinished = true; // the janitor writes it down as soon as it can
        core.deps.logger.warn({ sandboxId: entry.id, err: cause }, "held, and not written down yet");
      }
    },
    async undo({ core, entry, before }) {
      entry.set({ frozen: before.frozen, stranger: before.stranger });
      await persist(core, entry, { durable: false });
    },
  },
];

/** What frees the guest: a resume begins a new life time, a thaw gives back the time that it was held. */
export type GoOnReason = { kind: "resume"; lifetime: Lifetime | undefined } | { kind: "thaw" };

export interface GoOnContext {
  core: Core;
  entry: SandboxEntry;
  why: GoOnReason;
  before?: SandboxRecord;
}

export const goOnSteps: readonly Step<GoOnContext>[] = [
  {
    name: "unfreeze",
    async run({ entry }, signal) {
      const { vm } = entry.placed!;
      if (vm.state === "frozen") await vm.unfreeze(signal);
    },
    async undo({ entry }, signal) {
      await stopGuest(entry, signal);
    },
  },
  {
    // Its clock stood still.
    name: "await-guest",
    async run({ core, entry }, signal) {
      await startGuest(core, entry, entry.placed!, { growRootFs: false }, signal);
    },
  },
  {
    name: "journal-going-on",
    async run(ctx) {
      const { core, entry, why } = ctx;
      ctx.before = entry.record;
      const nowMs = core.deps.clock.nowMs();
      const { spec, lifetimeSinceMs } = entry.record;
      const heldMs = Math.max(0, nowMs - heldSinceMs(entry.record, nowMs));
      entry.lastActivityMs = nowMs;
      entry.set({
        frozen: undefined,
        stranger: undefined,
        ...(why.kind === "thaw"
          ? { lifetimeSinceMs: lifetimeSinceMs + heldMs }
          : { startedAtMs: nowMs, lifetimeSinceMs: nowMs }),
        ...(why.kind === "resume" &&
          why.lifetime !== undefined && { spec: { ...spec, lifetime: why.lifetime } }),
      });
      await persist(core, entry, { durable: false });
    },
    async undo({ core, entry, before }) {
      if (before === undefined) return;
      const { frozen, stranger, spec, startedAtMs, lifetimeSinceMs } = before;
      entry.set({ frozen, stranger, spec, startedAtMs, lifetimeSinceMs });
      await persist(core, entry, { durable: false });
    },
  },
];

function heldSinceMs({ frozen, stranger }: SandboxRecord, nowMs: number): number {
  return Math.min(frozen?.sinceMs ?? nowMs, stranger?.sinceMs ?? nowMs);
}

/** Bears a guest that is stopped already. */
export async function stopGuest(entry: SandboxEntry, signal: AbortSignal): Promise<void> {
  entry.endUses(new RookeryError("wrong_state", "the sandbox was paused", { details: { status: "paused" } }));
  const { vm } = entry.placed!;
  if (vm.state === "running") await vm.freeze(signal);
}
