/**
 * A whole agent with a simulated VMM, as a value: many fit in one process.
 *
 * It is the agent program itself (`serve`): lock, journal, recovery, manager,
 * RPC server on a port of its own, registration by a one-time token, heartbeats.
 * Only what `world` names is put in the place of the real thing.
 */
import { join } from "node:path";
import { RookeryError } from "@rookery/protocol/errors";
import { pino } from "pino";
import type { Logger } from "pino";
import packageJson from "../../package.json" with { type: "json" };
import { readConfig } from "../config.ts";
import type { Send } from "../control-plane/control-plane-client.ts";
import type { Agent } from "../open-agent.ts";
import { systemClock } from "../sandbox-manager/clock.ts";
import type { Clock } from "../sandbox-manager/clock.ts";
import { serve } from "../serve.ts";
import type { Serving } from "../serve.ts";
import { memoryProcessTable } from "../vmm/simulated-processes.ts";
import type { ProcessTable } from "../vmm/simulated-processes.ts";
import { seededBytes, seededRandom } from "./seeded-random.ts";
import { openSimulatedHost } from "./simulated-host.ts";

export interface SimulatedAgentOptions {
  /** Its own; what outlives it lies there. */
  dataDir: string;
  controlPlaneUrl: string;
  /** Not needed when the data directory has credentials. */
  registrationToken?: string;
  /** Default: a free port of 127.0.0.1. */
  listen?: string;
  /** Settings as the program's environment has them, such as ROOKERY_HEARTBEAT_MS. */
  environment?: Readonly<Record<string, string>>;
  logger?: Logger;
  /** Default: the system's. */
  clock?: Clock;
  /** [0, 1): ids, pids, timings and jitter. Default: from `seed`. */
  random?: () => number;
  seed?: number;
  /** Carries calls to the control plane: where a test cuts or delays them. */
  send?: Send;
  /** VMs live here: give the next agent on this data directory the same table, and it adopts them. */
  processes?: ProcessTable;
  /** Another one than last time: the host was booted anew, and no VM lives. */
  bootId?: string;
  /** Called inside of effects of the seams (`disk.create`, `network.up`, …); what it throws fails them. */
  trouble?: (effect: string) => void;
  freeDiskBytes?: (path: string) => Promise<number>;
}

export interface SimulatedAgent extends AsyncDisposable {
  readonly hostId: string;
  readonly address: { host: string; port: number };
  readonly agent: Agent;
  readonly processes: ProcessTable;
  /** Settles when it has ended; rejects when it failed. */
  readonly ended: Promise<void>;
  /** As SIGTERM does: finishes what is under way. VMs stay in `processes`. Bears running twice. */
  stop(): Promise<void>;
}

/** Resolves when it serves and is registered; rejects with what the program would have died of. */
export async function startSimulatedAgent(options: SimulatedAgentOptions): Promise<SimulatedAgent> {
  const { dataDir, clock = systemClock, trouble, bootId, freeDiskBytes } = options;
  const random = options.random ?? seededRandom(options.seed ?? 1);
  const processes = options.processes ?? memoryProcessTable();
  const config = readConfig(
    {
      ROOKERY_POOL: "0",
      ROOKERY_AGENT_ADDRESS: "127.0.0.1:0",
      ...options.environment,
      ROOKERY_VMM: "simulated",
    },
    {
      data: dataDir,
      controlPlane: options.controlPlaneUrl,
      register: options.registrationToken,
      ...(options.listen !== undefined && { address: options.listen }),
    },
    // Where guest images would be built from: a simulated host builds none.
    join(dataDir, "no-package"),
  );
  const stop = new AbortController();
  const ready = Promise.withResolvers<Serving>();
  const ended = serve(config, {
    logger: options.logger ?? pino({ level: "silent" }),
    version: packageJson.version,
    stop: stop.signal,
    onReady: ready.resolve,
    world: {
      clock,
      random,
      randomBytes: seededBytes(random),
      ...(options.send !== undefined && { send: options.send }),
      openMachine: () =>
        openSimulatedHost({
          dataDir,
          clock,
          random,
          processes,
          ...(bootId !== undefined && { bootId }),
          ...(trouble !== undefined && { trouble }),
          ...(freeDiskBytes !== undefined && { freeDiskBytes }),
        }),
    },
  });
  const endEarly = ended.then(() => {
    throw new RookeryError("unavailable", "the agent ended before it was ready");
  });
  const serving = await Promise.race([ready.promise, endEarly]);
  endEarly.catch(() => undefined); // whoever cares looks at `ended`
  const end = async (): Promise<void> => {
    stop.abort(new RookeryError("unavailable", "stopped"));
    await ended;
  };
  return {
    hostId: serving.hostId,
    address: serving.address,
    agent: serving.agent,
    processes,
    ended,
    stop: end,
    [Symbol.asyncDispose]: end,
  };
}
