/** One seed, from its schedule to its verdict. */
import { setTimeout as sleep } from "node:timers/promises";
import { History } from "./history.ts";
import type { Log } from "./in-process/log.ts";
import { type Violation, judge } from "./oracle.ts";
import { play } from "./player.ts";
import { Random } from "./random.ts";
import { type Schedule, makeSchedule } from "./schedule.ts";
import { type ApiAnswer, type ApiRequest, NoAnswer, type World } from "./world.ts";

export interface RunResult {
  seed: number;
  ops: number;
  faults: Readonly<Record<string, number>>;
  ok: boolean;
  violations: Violation[];
  /** Milliseconds: of all, and until the dust had settled. */
  ms: number;
  settledMs: number;
  answers: number;
  unanswered: number;
  /** Calls without an answer after all faults had ended; each was asked again. */
  hangs: number;
  /** That callers know of. */
  sandboxes: number;
  /** What guests wrote down and were asked about: none of it would be a suite that looks away. */
  notes: number;
}

/** Silence, one round, the longest deadline and a lease, on a machine that may be busy. */
const SETTLE_LIMIT_MS = 20_000;
const LOOK_AGAIN_MS = 100;

export async function runSeed(options: {
  seed: number;
  operations: number;
  pace: number;
  /** One form of the suite, with this run's schedule. */
  openWorld: (parts: { schedule: Schedule; random: Random; log: Log }) => Promise<World>;
  log: Log;
}): Promise<RunResult> {
  const { seed, operations, pace, log } = options;
  const beganAt = performance.now();
  const schedule = makeSchedule(seed, operations, pace);
  const history = new History();
  const random = new Random(seed ^ 0x5eed);
  await using world = await options.openWorld({ schedule, random, log });
  await play(world, schedule, history);
  log.note({}, "all faults end");
  await world.heal();
  const healedAt = performance.now();
  let violations = await settle(world, history, pace);
  const settledMs = performance.now() - healedAt;
  if (violations.length === 0) violations = await finish(world, history, pace);
  log.note({ violations }, "verdict");
  return {
    seed,
    ops: operations,
    faults: world.faults,
    ok: violations.length === 0,
    violations,
    ms: Math.round(performance.now() - beganAt),
    settledMs: Math.round(settledMs),
    answers: history.answers,
    unanswered: history.unanswered,
    hangs: history.hangs,
    sandboxes: history.sandboxes.length,
    notes: [...history.written.values()].reduce((sum, notes) => sum + notes.size, 0),
  };
}

/** Waits until nothing is to be said against the world, and no longer than the dust may take. */
async function settle(world: World, history: History, pace: number): Promise<Violation[]> {
  const giveUpAt = performance.now() + SETTLE_LIMIT_MS * pace;
  for (;;) {
    const violations = judge(history, await world.observe(), world);
    if (violations.length === 0 || performance.now() > giveUpAt) return violations;
    await sleep(LOOK_AGAIN_MS * pace);
  }
}

/** All that is paused comes back with its memory, and all that is goes without a trace. */
async function finish(world: World, history: History, pace: number): Promise<Violation[]> {
  const failed: Violation[] = [];
  const insist = async (what: string, request: ApiRequest, status: number): Promise<void> => {
    const answer = await insistOn(world, history, request, pace);
    if (answer.status !== status) failed.push({ what, path: request.path, answer });
  };
  const before = await world.observe();
  for (const { id } of before.sandboxes.filter(({ status }) => status === "paused")) {
    const answer = await resumeSurely(world, history, id, pace);
    if (answer !== undefined) failed.push({ what: "a paused sandbox can't be resumed", id, answer });
  }
  const resumed = [...failed, ...(await settle(world, history, pace))];
  if (resumed.length > 0) return resumed;
  for (const { id } of before.sandboxes.filter(({ status }) => status === "running" || status === "paused")) {
    await insist("a sandbox can't be destroyed", { method: "DELETE", path: `/v1/sandboxes/${id}` }, 204);
    history.destroyed.add(id);
  }
  for (const { name } of before.snapshots) {
    await insist("a snapshot can't be deleted", { method: "DELETE", path: `/v1/snapshots/${name}` }, 204);
  }
  const left = await settle(world, history, pace);
  const { machines } = await world.observe();
  return [
    ...failed,
    ...left,
    ...machines
      .filter(({ sandboxes, vms, snapshots }) => sandboxes.length + vms.length + snapshots.length > 0)
      .map(({ hostId }) => ({ what: "something is left after all was destroyed", host: hostId })),
  ];
}

/** Undefined when it runs; otherwise the last answer. */
async function resumeSurely(
  world: World,
  history: History,
  id: string,
  pace: number,
): Promise<ApiAnswer | undefined> {
  const giveUpAt = performance.now() + SETTLE_LIMIT_MS * pace;
  for (;;) {
    const answer = await callSurely(world, history, { method: "POST", path: `/v1/sandboxes/${id}/resume` });
    if (answer.status === 200) return undefined;
    // The answer may have been late on a busy machine, and another look done the rest.
    const { sandboxes } = await world.observe();
    if (sandboxes.some((row) => row.id === id && row.status === "running")) return undefined;
    if (performance.now() > giveUpAt) return answer;
    await sleep(LOOK_AGAIN_MS * pace);
  }
}

/** A caller who gave up may ask again. */
async function callSurely(world: World, history: History, request: ApiRequest): Promise<ApiAnswer> {
  try {
    return await world.call(0, request);
  } catch (cause) {
    if (!(cause instanceof NoAnswer)) throw cause;
    history.hangs += 1;
    return { status: 504, body: cause.message };
  }
}

/** Again while the answer is that it may be tried again: a busy machine is slow. */
async function insistOn(
  world: World,
  history: History,
  request: ApiRequest,
  pace: number,
): Promise<ApiAnswer> {
  const giveUpAt = performance.now() + SETTLE_LIMIT_MS * pace;
  for (;;) {
    const answer = await callSurely(world, history, request);
    if (answer.status < 500 || performance.now() > giveUpAt) return answer;
    await sleep(LOOK_AGAIN_MS * pace);
  }
}
