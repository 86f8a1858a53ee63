/**
 * One replica of the control plane, put together: the database, the clients of
 * hosts, the services, and what comes again and again. Every fact that must
 * survive is in PostgreSQL, so any number of replicas may run and die.
 */
import { randomBytes } from "node:crypto";
import { join } from "node:path";
import { Failpoints, type Reach } from "@rookery/protocol/failpoints";
import { Registry } from "prom-client";
import { type DatabaseOptions, openDatabase } from "./db/database.ts";
import { dropOldSandboxEvents } from "./db/sandbox-events.ts";
import { MIGRATIONS_DIR, isMigrated, readMigrations } from "./db/migrate.ts";
import type { Config } from "./config.ts";
import { openCluster } from "./hosts/cluster.ts";
import { HostCredentials } from "./hosts/credentials.ts";
import { CREDENTIAL_FAILPOINTS } from "./hosts/failpoints.ts";
import { DeadlineSweep } from "./hosts/deadline-sweep.ts";
import { EventReader } from "./hosts/event-reader.ts";
import { type OpenTransport, openHostClient } from "./hosts/host-client.ts";
import { HostClientPool, type OpenClient } from "./hosts/host-client-pool.ts";
import { HostMonitor } from "./hosts/host-monitor.ts";
import { type Loop, startLoop } from "./hosts/loop.ts";
import { retireClients } from "./hosts/retire-clients.ts";
import { monitorMetrics } from "./hosts/monitor-metrics.ts";
import { newScheduler } from "./hosts/scheduler.ts";
import { commandTokens } from "./hosts/tokens.ts";
import { type Clock, systemClock } from "./model/clock.ts";
import type { Log } from "./model/log.ts";
import { newIds } from "./model/new-ids.ts";
import { newSealer } from "./model/sealer.ts";
import { type Deps, SERVICE_DEFAULTS } from "./service/deps.ts";
import { openServices } from "./service/open-services.ts";
import type { Services } from "./service/services.ts";

/** Rows that one sweep claims. */
const BATCH = 50;
/** Hosts that one replica checks in one round; most cost no more than their row. */
const CHECKED_HOSTS = 500;
const MAX_READ_HOSTS = 5_000;
/** Old events deleted at once, and at most so often in one round. */
const RETENTION_BATCH = 1_000;
const RETENTION_BATCHES = 50;
const RETENTION_TICK_MS = 10_000;
/** How often a replica says that it listens, in the time after which a host counts as silent. */
const HEARINGS = 9;
const MONITOR_TICK_MS = 1_000;
/** What another replica revoked or deleted is connected to no longer than this. */
const CLIENTS_TICK_MS = 5_000;
const CLIENT = {
  answerGraceMs: 5_000,
  lookMs: 10_000,
  connectTimeoutMs: 5_000,
  pingIntervalMs: 20_000,
  pingTimeoutMs: 10_000,
};

export interface ControlPlane {
  services: Services;
  deps: Deps;
  /** Its figures; those of the API come beside them. */
  metrics: Registry;
  /** Its failpoints: unarmed unless the environment says otherwise. */
  reach: Reach;
  /** Begins what comes again and again; for `serve` only. */
  start(): void;
  close(): Promise<void>;
}

/** What a simulated run puts in the place of the world's. */
export interface Seams {
  clock?: Clock;
  openTransport?: OpenTransport;
  DatabaseClient?: DatabaseOptions["Client"];
  /** Overrides of what waits for hosts. */
  client?: Partial<typeof CLIENT>;
}

export async function openControlPlane(config: Config, log: Log, seams: Seams = {}): Promise<ControlPlane> {
  const { clock = systemClock, openTransport, client, DatabaseClient } = seams;
  const {
    db,
    pool: connections,
    close,
  } = openDatabase({
    Client: DatabaseClient,
    url: config.databaseUrl,
    maxConnections: config.databaseConnections,
    connectTimeoutMs: 10_000,
    statementTimeoutMs: 30_000,
    onError: (cause, words) => log.warn({ err: cause }, words),
  });
  const migrations = await readMigrations(MIGRATIONS_DIR);
  const now = (): number => clock.now();
  const random = randomBytes;
  const ids = newIds(random);
  const sealer = newSealer(config.secretKey, random, config.otherSecretKeys);
  try {
    if (!(await isMigrated(connections, migrations))) {
      throw new Error("the database is not migrated: run `control-plane migrate`");
    }
    const cluster = await openCluster(db, { sealer, ids, random });
    const token = commandTokens(cluster, now);
    const open: OpenClient = (endpoint) =>
      openHostClient(endpoint, { ...CLIENT, ...client, clusterId: cluster.id, now, token }, openTransport);
    const hostDeps = { db, pool: new HostClientPool(open), clock, log };
    const reach = openFailpoints(config.failpointsDir, log);
    const credentials = new HostCredentials({
      db,
      cluster,
      random,
      now,
      options: config.credentials,
      reach,
    });
    const metrics = new Registry();
    const loops = prepareLoops(config, hostDeps, { replica: ids.text(20), metrics });
    const deps: Deps = {
      ...hostDeps,
      ids,
      random,
      sealer,
      cluster,
      credentials,
      scheduler: newScheduler(config.scheduler),
      options: { ...SERVICE_DEFAULTS, ...config.services },
      isMigrated: () => isMigrated(connections, migrations),
      onHostSeen: () => loops.wake(),
    };
    return {
      deps,
      metrics,
      reach,
      services: openServices(deps),
      start: () => loops.start(),
      close: async () => {
        await loops.stop();
        hostDeps.pool.close();
        await close();
      },
    };
  } catch (cause) {
    await close();
    throw cause;
  }
}

function openFailpoints(dir: string | undefined, log: Log): Reach {
  if (dir !== undefined) log.warn({ dir }, "failpoints can be armed: this replica is for tests alone");
  const failpoints = new Failpoints({
    known: CREDENTIAL_FAILPOINTS,
    ...(dir !== undefined && {
      controlFile: join(dir, "failpoints.json"),
      hitsFile: join(dir, "failpoint-hits"),
    }),
  });
  return (name) => failpoints.reach(name);
}

function prepareLoops(
  config: Config,
  deps: Pick<Deps, "db" | "pool" | "clock" | "log">,
  { replica, metrics }: { replica: string; metrics: Registry },
) {
  const { db, clock, log } = deps;
  const ending = new AbortController();
  const { signal } = ending;
  const { leaseMs } = config.services;
  const monitor = new HostMonitor(deps, {
    ...config.monitor,
    batch: CHECKED_HOSTS,
    ...monitorMetrics(metrics),
  });
  const sweep = new DeadlineSweep(deps, {
    batch: BATCH,
    leaseMs,
    againMs: Math.min(5_000, leaseMs),
    silentAgainMs: 2 * leaseMs,
  });
  const reader = new EventReader(deps, {
    reader: replica,
    leaseMs: config.eventLeaseMs,
    maxHosts: MAX_READ_HOSTS,
    againMs: Math.min(1_000, config.eventLeaseMs),
  });
  const loops: Loop[] = [];
  let listening: Promise<void> | undefined;
  const dropOldEvents = async (): Promise<void> => {
    for (let batches = 0; batches < RETENTION_BATCHES && !signal.aborted; batches++) {
      const dropped = await dropOldSandboxEvents(db, { keepMs: config.eventKeepMs, limit: RETENTION_BATCH });
      if (dropped < RETENTION_BATCH) return;
    }
  };
  const start = (name: string, everyMs: number, round: () => Promise<unknown>): void => {
    loops.push(
      startLoop({ name, everyMs, clock, log, signal }, async () => {
        await round();
      }),
    );
  };
  return {
    start: () => {
      start("monitor", Math.min(MONITOR_TICK_MS, config.monitor.everyMs), () => monitor.round(signal));
      start("hearing", config.monitor.silentMs / HEARINGS, () => monitor.hear());
      start("sweep", config.sweepMs, () => sweep.round());
      start("clients", CLIENTS_TICK_MS, () => retireClients(deps));
      start("news", config.newsPollMs, () => db.news.poll());
      start("retention", RETENTION_TICK_MS, dropOldEvents);
      listening = db.news.listen(clock, signal);
      start("events", Math.ceil(config.eventLeaseMs / 3), () => reader.round());
    },
    wake: () => {
      for (const loop of loops) loop.wake();
    },
    stop: async () => {
      ending.abort();
      await Promise.all([listening, ...loops.map(({ done }) => done)]);
      if (loops.length > 0) await reader.close();
    },
  };
}
