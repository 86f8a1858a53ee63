/**
 * A control plane on a database of its own, whose hosts are fake agents that
 * registered by the real path.
 */
import { randomBytes } from "node:crypto";
import { afterAll } from "vitest";
import type { OpenDatabase } from "../../db/database.ts";
import { openTestDatabase, useTestDatabase } from "../../db/testing/test-database.ts";
import { insertTeam } from "../../db/teams.ts";
import { openCluster } from "../../hosts/cluster.ts";
import { HostCredentials } from "../../hosts/credentials.ts";
import { openHostClient } from "../../hosts/host-client.ts";
import { HostClientPool } from "../../hosts/host-client-pool.ts";
import { newScheduler } from "../../hosts/scheduler.ts";
import { FakeAgent } from "../../hosts/testing/fake-agent.ts";
import { commandTokens } from "../../hosts/tokens.ts";
import { systemClock } from "../../model/clock.ts";
import type { HostId } from "../../model/ids.ts";
import type { Log } from "../../model/log.ts";
import { newIds } from "../../model/new-ids.ts";
import { newSealer } from "../../model/sealer.ts";
import { type Deps, SERVICE_DEFAULTS, type ServiceOptions } from "../deps.ts";
import { openServices } from "../open-services.ts";
import type { Caller, CreateSandboxInput, Services } from "../services.ts";

export interface LogLine {
  level: keyof Log;
  facts: Record<string, unknown>;
  words: string;
}

export interface TestPlane {
  deps: Deps;
  services: Services;
  log: LogLine[];
  /** The same database, as another replica has it. */
  openAnother(): OpenDatabase;
  newCaller(role?: Caller["role"]): Promise<Caller>;
  /** A registered shared host and the agent behind it. */
  newHost(): Promise<TestHost>;
}

export interface TestHost {
  id: HostId;
  agent: FakeAgent;
  accessToken: string;
  refreshToken: string;
}

export const DEFAULTS: CreateSandboxInput = {
  template: "base",
  timeoutSec: 300,
  onTimeout: "pause",
  timeoutMode: "idle",
  env: {},
  metadata: {},
};

export const LOAD = { cpus: 0, memoryMbUsed: 0, diskMbFree: 1, sandboxes: 0 };

/** Call it at the top of a test file. */
export function useTestPlane(options: Partial<ServiceOptions> = {}): () => Promise<TestPlane> {
  const database = useTestDatabase();
  const closing: (() => Promise<void> | void)[] = [];
  afterAll(async () => {
    for (const close of closing.toReversed()) await close();
  });
  return async () => {
    const lines: LogLine[] = [];
    const { db } = database;
    const ids = newIds(randomBytes);
    const sealer = newSealer("a key of thirty-two characters..", randomBytes);
    const cluster = await openCluster(db, { sealer, ids, random: randomBytes });
    const now = (): number => Date.now();
    const token = commandTokens(cluster, now);
    const pool = new HostClientPool((endpoint) =>
      openHostClient(endpoint, {
        clusterId: cluster.id,
        answerGraceMs: 1_000,
        lookMs: 2_000,
        connectTimeoutMs: 2_000,
        pingIntervalMs: 20_000,
        pingTimeoutMs: 10_000,
        now,
        token,
      }),
    );
    closing.push(() => pool.close());
    const deps: Deps = {
      db,
      pool,
      clock: systemClock,
      log: recordingLog(lines),
      ids,
      random: randomBytes,
      sealer,
      cluster,
      credentials: new HostCredentials({
        db,
        cluster,
        random: randomBytes,
        now,
        options: { registrationMs: 3_600_000, accessMs: 86_400_000, refreshMs: 86_400_000 },
      }),
      scheduler: newScheduler("round-robin"),
      options: { ...SERVICE_DEFAULTS, ...options },
      isMigrated: async () => true,
      onHostSeen: () => undefined,
    };
    const services = openServices(deps);
    const newCaller = async (role: Caller["role"] = "member"): Promise<Caller> => {
      const teamId = ids.team();
      await insertTeam(db, { id: teamId, name: teamId });
      return { keyId: ids.apiKey(), teamId, role };
    };
    return {
      deps,
      services,
      log: lines,
      openAnother: () => openTestDatabase(database.url),
      newCaller,
      newHost: async () => {
        const agent = await new FakeAgent().listen();
        closing.push(() => agent[Symbol.asyncDispose]());
        return registerAgent(services, await newCaller("platform"), agent);
      },
    };
  };
}

export async function registerAgent(services: Services, caller: Caller, agent: FakeAgent): Promise<TestHost> {
  const { registrationToken } = await services.createHost(caller, {
    name: "test",
    type: "shared",
    labels: {},
  });
  const { hostId, accessToken, refreshToken } = await services.registerHost(
    factsOf(agent, registrationToken),
  );
  await services.heartbeat(accessToken, hostId, {
    load: LOAD,
    digest: "d",
    eventLogId: agent.logId,
    lastEventNumber: 0n,
  });
  return { id: hostId, agent, accessToken, refreshToken };
}

export function factsOf(agent: FakeAgent, token: string) {
  return {
    token,
    address: agent.address,
    publicKey: "AAAA",
    arch: "x86_64",
    cpus: 2,
    memoryMb: 16_384,
    diskMb: 100_000,
    drivers: { vmm: "simulated" },
    version: "0.1.0",
  };
}

function recordingLog(lines: LogLine[]): Log {
  const at = (level: keyof Log) => (facts: object, words: string) => {
    lines.push({ level, facts: facts as Record<string, unknown>, words });
  };
  return { debug: at("debug"), info: at("info"), warn: at("warn"), error: at("error") };
}
