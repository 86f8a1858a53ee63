/**
 * The life of a sandbox: one table is diagram, guard and generator.
 *
 * A status of WORK means that someone is at it and that the row has a deadline:
 * past it, any replica may settle the row. FINAL statuses have no way out.
 * `missing` is reversible: its host went silent.
 *
 * A sandbox that is `resuming` on another host than it was paused on has a copy
 * on the former (`movingFrom`), and goes back to it when it never came to run.
 *
 * Events are either commands (`pause`, `resume`, `destroy`, `assign`), a host's
 * word about what is (`seen…`, `gone`, `died`), or a verdict about a host
 * (`hostLost`, `hostDeleted`). A pause that failed is `pausing` + `seenRunning`.
 */
import type { SandboxStatus } from "./sandbox.ts";

export type SandboxEvent =
  /** A host was chosen and is told to make it. */
  | "assign"
  /** The host had no room, or did not answer: another one is looked for. */
  | "refused"
  | "pause"
  | "resume"
  /** Another host is told to resume it. */
  | "moveOn"
  /** No other host has it: it is paused where it was. */
  | "moveBack"
  | "destroy"
  | "seenRunning"
  | "seenPaused"
  /** Its host holds nothing of it any more, as one who was told to end it. */
  | "gone"
  /** It can't be brought back. */
  | "died"
  | "hostLost"
  /** Its host is none of ours any more, and nobody will be asked. */
  | "hostDeleted";

export const NEXT: Record<SandboxStatus, Partial<Record<SandboxEvent, SandboxStatus>>> = {
  pending: { assign: "starting", died: "error", destroy: "stopping" },
  starting: {
    seenRunning: "running",
    seenPaused: "paused",
    refused: "pending",
    died: "error",
    hostLost: "missing",
    hostDeleted: "stopped",
    destroy: "stopping",
  },
  running: {
    pause: "pausing",
    seenPaused: "paused",
    gone: "stopped",
    died: "error",
    hostLost: "missing",
    hostDeleted: "stopped",
    destroy: "stopping",
  },
  pausing: {
    seenPaused: "paused",
    seenRunning: "running",
    gone: "stopped",
    died: "error",
    hostLost: "missing",
    hostDeleted: "stopped",
    destroy: "stopping",
  },
  paused: {
    resume: "resuming",
    seenRunning: "running",
    gone: "stopped",
    died: "error",
    hostDeleted: "stopped",
    destroy: "stopping",
  },
  resuming: {
    moveOn: "resuming",
    moveBack: "paused",
    seenRunning: "running",
    seenPaused: "paused",
    gone: "stopped",
    died: "error",
    hostLost: "missing",
    hostDeleted: "stopped",
    destroy: "stopping",
  },
  missing: {
    moveBack: "paused",
    seenRunning: "running",
    seenPaused: "paused",
    gone: "stopped",
    died: "error",
    hostDeleted: "stopped",
    destroy: "stopping",
  },
  stopping: { gone: "stopped", hostDeleted: "stopped" },
  stopped: {},
  error: {},
};

const WORK: ReadonlySet<SandboxStatus> = new Set(["pending", "starting", "pausing", "resuming", "stopping"]);
const FINAL: ReadonlySet<SandboxStatus> = new Set(["stopped", "error"]);

export const isWork = (status: SandboxStatus): boolean => WORK.has(status);
export const isFinal = (status: SandboxStatus): boolean => FINAL.has(status);

/** Where `event` leads, or undefined when it means nothing in this status. */
export function nextStatus(status: SandboxStatus, event: SandboxEvent): SandboxStatus | undefined {
  return NEXT[status][event];
}
