/**
 * What happens in a run: operations of callers and faults of the world, in an
 * order that follows from the seed alone. Both forms of the suite play the same.
 *
 * Each seed draws its own mixture of faults (some not at all): runs in which
 * everything fails all the time find less than runs that differ.
 */
import { Random } from "./random.ts";

/** A number of [0, 1) that chooses among what there is when the step comes. */
export type Choice = number;

export type Operation = (
  | { kind: "create"; key: boolean; timeoutSec: number; onTimeout: "pause" | "destroy" }
  /** The same request and key as an earlier create. */
  | { kind: "create-again"; create: Choice }
  | { kind: "create-from"; snapshot: Choice; key: boolean }
  | { kind: "exec" | "ping" | "pause" | "resume" | "destroy" | "get"; sandbox: Choice }
  | { kind: "patch"; sandbox: Choice; timeoutSec: number }
  | { kind: "snapshot"; sandbox: Choice; name: string; overwrite: boolean }
  | { kind: "delete-snapshot"; snapshot: Choice }
  | { kind: "list" }
) & {
  /** The replica that is asked first. */
  replica: Choice;
  /** How often a caller without an answer asks again, another replica each time. */
  retries: number;
};

/** Which way a message goes: to an agent, or from it. */
export type Direction = "commands" | "heartbeats" | "both";

/** `host` and `replica` are indices; without `replica`, it concerns all of them. */
export type Fault =
  /** Refused at once. */
  | { kind: "cut"; host: number; replica?: number; direction: Direction; ms: number }
  /** Nothing comes through, and nobody says so. */
  | { kind: "silence"; host: number; replica?: number; direction: Direction; ms: number }
  /** Requests and answers get lost, now and then, or come late. */
  | { kind: "loss"; host: number; share: number; delayMs: number; ms: number }
  /** The same between callers and replicas. */
  | { kind: "caller-loss"; share: number; ms: number }
  /** At a failpoint, or now. Its VMs go on. */
  | { kind: "agent-crash"; host: number; failpoint?: Choice; downMs: number }
  /** Its VMs end too. */
  | { kind: "host-reboot"; host: number; downMs: number }
  | { kind: "replica-crash"; replica: number; downMs: number }
  /** Stands still in the middle of everything, and then goes on as if no time had passed. */
  | { kind: "agent-stall"; host: number; ms: number }
  | { kind: "replica-stall"; replica: number; ms: number }
  | { kind: "database-outage"; ms: number }
  /** Connections break; new ones are taken. */
  | { kind: "database-cut" }
  | { kind: "clock-skew"; host: number; skewMs: number; ms: number }
  | { kind: "disk-full"; host: number; ms: number }
  /** Effects fail now and then. */
  | { kind: "trouble"; host: number; share: number; ms: number }
  | { kind: "step-fails"; host: number; failpoint: Choice; times: number }
  | { kind: "guest-crash"; host: number; guest: Choice }
  | { kind: "slow"; host: number; delayMs: number; ms: number }
  /** Somebody shows a refresh token that the host had before. */
  | { kind: "stolen-token"; host: number }
  /**
   * Of its next commands copies come after newer ones (`keep` of those that can be
   * obeyed again); the first `lose` come in no other way. Meanwhile its clock is
   * behind, so that no deadline keeps them off.
   */
  | { kind: "late-commands"; host: number; keep: number; lose: number; behindMs: number; ms: number };

export type FaultKind = Fault["kind"];

export type Step = { gapMs: number } & ({ operation: Operation } | { fault: Fault });

export interface Schedule {
  seed: number;
  /** All times are this many times as long: for machines that have other work too. */
  pace: number;
  hosts: number;
  replicas: number;
  /** Operations under way at once. */
  inFlight: number;
  /** Callers choose among this many sandboxes, the latest that they know of. */
  focus: number;
  steps: Step[];
}

const FAULT_WEIGHTS: Readonly<Record<FaultKind, number>> = {
  cut: 3,
  silence: 3,
  loss: 4,
  "caller-loss": 2,
  "agent-crash": 4,
  "host-reboot": 1,
  "replica-crash": 3,
  "agent-stall": 2,
  "replica-stall": 2,
  "database-outage": 2,
  "database-cut": 2,
  "clock-skew": 1,
  "disk-full": 2,
  trouble: 2,
  "step-fails": 3,
  "guest-crash": 3,
  slow: 2,
  "stolen-token": 1,
  "late-commands": 4,
};

const OPERATION_WEIGHTS: Readonly<Record<Operation["kind"], number>> = {
  create: 16,
  "create-again": 4,
  "create-from": 4,
  exec: 18,
  ping: 3,
  pause: 12,
  resume: 13,
  destroy: 8,
  get: 6,
  patch: 4,
  snapshot: 5,
  "delete-snapshot": 2,
  list: 2,
};

export function makeSchedule(seed: number, operations: number, pace: number): Schedule {
  const random = new Random(seed);
  const hosts = random.between(2, 4);
  const replicas = random.between(2, 3);
  const world = { hosts, replicas, random: random.fork() };
  const faults = mixture(random.fork());
  const operationRandom = random.fork();
  const when = random.fork();
  // Per operation: from one fault in 50 to one in 8.
  const rate = 0.02 + 0.1 * random.next();
  const steps: Step[] = [];
  for (let index = 0; index < operations; index += 1) {
    if (Object.keys(faults).length > 0 && when.chance(rate)) {
      steps.push({ gapMs: 0, fault: makeFault(world.random.weighted(faults), world) });
    }
    const gapMs = when.chance(0.2) ? when.between(5, 60) : when.between(0, 3);
    steps.push({ gapMs, operation: makeOperation(operationRandom) });
  }
  return {
    seed,
    pace,
    hosts,
    replicas,
    inFlight: random.between(3, 10),
    focus: random.pick([5, 15, 40]),
    steps,
  };
}

function mixture(random: Random): Partial<Record<FaultKind, number>> {
  // One run in twenty is without any.
  if (random.chance(0.05)) return {};
  const share = random.pick([0.25, 0.5, 0.5, 1]);
  return Object.fromEntries(Object.entries(FAULT_WEIGHTS).filter(() => random.chance(share)));
}

function makeOperation(random: Random): Operation {
  const kind = random.weighted(OPERATION_WEIGHTS);
  const base = { replica: random.next(), retries: random.pick([0, 1, 1, 3]) };
  switch (kind) {
    case "create": {
      const timeoutSec = random.pick([0, 0, 0, 10, 30]);
      return {
        kind,
        key: random.chance(0.6),
        timeoutSec,
        onTimeout: random.pick(["pause", "destroy"]),
        ...base,
      };
    }
    case "create-again":
      return { kind, create: random.next(), ...base };
    case "create-from":
      return { kind, snapshot: random.next(), key: random.chance(0.6), ...base };
    case "patch":
      return { kind, sandbox: random.next(), timeoutSec: random.pick([0, 10, 60]), ...base };
    case "snapshot":
      return {
        kind,
        sandbox: random.next(),
        name: `snap-${random.between(0, 5)}`,
        overwrite: random.chance(0.5),
        ...base,
      };
    case "delete-snapshot":
      return { kind, snapshot: random.next(), ...base };
    case "list":
      return { kind, ...base };
    default:
      return { kind, sandbox: random.next(), ...base };
  }
}

function makeFault(kind: FaultKind, world: { hosts: number; replicas: number; random: Random }): Fault {
  const { random } = world;
  const host = random.between(0, world.hosts - 1);
  const ms = random.pick([50, 150, 400, 900]);
  const direction = random.pick<Direction>(["commands", "heartbeats", "both", "both"]);
  const replica = random.chance(0.5) ? random.between(0, world.replicas - 1) : undefined;
  const share = random.pick([0.05, 0.2, 0.5]);
  switch (kind) {
    case "cut":
    case "silence":
      return { kind, host, replica, direction, ms };
    case "loss":
      return { kind, host, share, delayMs: random.pick([0, 20, 150]), ms };
    case "caller-loss":
      return { kind, share, ms };
    case "agent-crash":
      return {
        kind,
        host,
        failpoint: random.chance(0.7) ? random.next() : undefined,
        downMs: random.pick([0, 100, 900]),
      };
    case "host-reboot":
      return { kind, host, downMs: random.pick([50, 900]) };
    case "replica-crash":
      return { kind, replica: random.between(0, world.replicas - 1), downMs: random.pick([0, 100, 600]) };
    case "agent-stall":
      return { kind, host, ms };
    case "replica-stall":
      return { kind, replica: random.between(0, world.replicas - 1), ms };
    case "database-outage":
      return { kind, ms: random.pick([50, 300, 1_200]) };
    case "database-cut":
      return { kind };
    case "clock-skew":
      return { kind, host, skewMs: random.pick([-30_000, -1_000, 1_000, 30_000]), ms };
    case "disk-full":
      return { kind, host, ms };
    case "trouble":
      return { kind, host, share: random.pick([0.02, 0.1]), ms };
    case "step-fails":
      return { kind, host, failpoint: random.next(), times: random.pick([1, 1, 3]) };
    case "guest-crash":
      return { kind, host, guest: random.next() };
    case "slow":
      return { kind, host, delayMs: random.pick([30, 200]), ms };
    case "stolen-token":
      return { kind, host };
    case "late-commands":
      return {
        kind,
        host,
        keep: random.pick([4, 12]),
        lose: random.pick([0, 0, 1]),
        behindMs: random.pick([0, 30_000]),
        ms: random.pick([900, 3_000]),
      };
    default:
      return kind satisfies never;
  }
}
