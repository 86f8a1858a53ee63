/**
 * What follows when a row's status is held against what its host says.
 *
 * One table for all who compare: the monitor's rounds, the sweep of deadlines,
 * and whoever met an unexpected answer. Pure: it decides, settle.ts does.
 */
import type { SandboxEvent } from "../model/sandbox-state.ts";
import type { SandboxStatus } from "../model/sandbox.ts";
import type { AgentPhase, AgentSandbox } from "./host-agent.ts";

export type Verdict =
  /** As it should be. */
  | { kind: "agrees" }
  /** The host is at it: look again later. */
  | { kind: "at-work" }
  /** It is to end, and the host still holds something of it. */
  | { kind: "destroy" }
  | { kind: "move"; event: SandboxEvent; error?: { code: string; message: string } };

type Seen = AgentPhase | "nothing";
type Rule = Verdict | ((seen: AgentSandbox | undefined) => Verdict);

const AGREES: Verdict = { kind: "agrees" };
const DESTROY: Verdict = { kind: "destroy" };
const RUNS: Verdict = { kind: "move", event: "seenRunning" };
const IS_PAUSED: Verdict = { kind: "move", event: "seenPaused" };
const IS_GONE: Verdict = { kind: "move", event: "gone" };

const because =
  (event: SandboxEvent, code: string, message: string): Rule =>
  () => ({ kind: "move", event, error: { code, message } });

const DIED = (seen: AgentSandbox | undefined) =>
  ({
    kind: "move",
    event: "died",
    error: {
      code: seen?.exit?.code || "guest_error",
      message: seen?.exit?.message || "The sandbox's VM ended by itself.",
    },
  }) satisfies Verdict;
/** Where a VM ended while its agent was away nobody knows of a failure, and none is claimed. */
const FAILED: Rule = (seen) => ({
  ...DIED(seen),
  event: seen?.exit?.code === "ended_unseen" ? "gone" : "died",
});
const LOST = because("died", "host_error", "Its host has lost it.");

/** Phases that are not named here mean that the host is at work. */
const RULES: Partial<Record<SandboxStatus, Partial<Record<Seen, Rule>>>> = {
  starting: {
    running: RUNS,
    paused: IS_PAUSED,
    failed: DIED,
    nothing: because("died", "host_error", "It was never made: the work at it was cut short."),
  },
  running: { running: AGREES, paused: IS_PAUSED, failed: FAILED, nothing: IS_GONE },
  pausing: {
    running: because("seenRunning", "host_error", "The pause did not happen."),
    paused: IS_PAUSED,
    failed: FAILED,
    nothing: IS_GONE,
  },
  paused: { running: RUNS, paused: AGREES, failed: DIED, nothing: LOST },
  resuming: {
    running: RUNS,
    paused: because("seenPaused", "host_error", "The resume did not happen."),
    failed: DIED,
    nothing: LOST,
  },
  missing: { running: RUNS, paused: IS_PAUSED, failed: FAILED, nothing: IS_GONE },
  stopping: {
    running: DESTROY,
    paused: DESTROY,
    failed: DESTROY,
    starting: DESTROY,
    pausing: DESTROY,
    resuming: DESTROY,
    stopping: DESTROY,
    nothing: IS_GONE,
  },
};

export function judge(status: SandboxStatus, seen: AgentSandbox | undefined): Verdict {
  const rule = RULES[status]?.[seen?.phase ?? "nothing"];
  if (rule === undefined) return { kind: "at-work" };
  return typeof rule === "function" ? rule(seen) : rule;
}
