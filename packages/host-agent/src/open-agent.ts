/**
 * The agent's core, put together from configuration: lock, drivers, images,
 * guests, manager. What serves (RPC, heartbeats) is built on top of it by
 * `serve.ts`; `destroy-all` uses it bare.
 */
import { randomBytes } from "node:crypto";
import { mkdir } from "node:fs/promises";
import { availableParallelism, totalmem } from "node:os";
import { RookeryError } from "@rookery/protocol/errors";
import type { Logger } from "pino";
import type { Config } from "./config.ts";
import type { SnapshotSharing } from "./control-plane/control-plane-client.ts";
import { LINK_FAILPOINTS } from "./control-plane/control-plane-link.ts";
import { END_FAILPOINTS } from "./control-plane/host-ending.ts";
import { REGISTER_FAILPOINTS } from "./control-plane/register.ts";
import { Failpoints } from "@rookery/protocol/failpoints";
import type { GuestNetworkDriver } from "./guest-network/guest-network.ts";
import type { Guests } from "./guest/envd-client.ts";
import { DataLock } from "./host/data-lock.ts";
import type { WarmKey } from "./ids.ts";
import { openRealMachine } from "./machine.ts";
import type { Machine, MachineOptions } from "./machine.ts";
import type { RootDiskDriver } from "./root-disk/root-disk.ts";
import { FAILPOINTS, MANAGER_DEFAULTS, openSandboxManager, systemClock } from "./sandbox-manager/index.ts";
import type { SandboxManager } from "./sandbox-manager/index.ts";
import { sleep, type Clock } from "./sandbox-manager/clock.ts";
import { seededRandom } from "./simulated/seeded-random.ts";
import { openSimulatedHost, refuseSimulatedData } from "./simulated/simulated-host.ts";
import type { Places } from "./vm-pool/places.ts";
import { openObjectStore } from "./object-store/open-object-store.ts";
import type { ObjectStore } from "./object-store/object-store.ts";
import { compatOf } from "./sandbox-manager/compat.ts";
import { StoredSnapshots, type SnapshotStoreOptions } from "./snapshot-store/snapshot-store.ts";
import type { VmmDriver, VmmProbe } from "./vmm/vmm.ts";
import type { PlaceMaker } from "./warm-images/build-warm-image.ts";
import { WarmImageStore } from "./warm-images/warm-image-store.ts";

/** A heartbeat does not wait longer for a store that does not answer. */
const STORE_LOOK_MS = 3_000;

export interface Agent extends AsyncDisposable {
  manager: SandboxManager;
  envd: Guests;
  failpoints: Failpoints;
  vmm: VmmDriver;
  vmmProbe: VmmProbe;
  rootDisk: RootDiskDriver;
  network: GuestNetworkDriver;
  /** What this host can do with snapshots of others. */
  snapshotSharing(): Promise<SnapshotSharing>;
}

export interface AgentOptions {
  config: Config;
  logger: Logger;
  /** Ends an agent that has the data directory, instead of being refused. */
  seize?: { graceMs: number };
  signal: AbortSignal;
  world?: World;
}

/** What a simulated run puts in the place of the world; without it the agent stands on the real one. */
export interface World {
  clock?: Clock;
  /** Of the agent's ids and of what guests are given as entropy. */
  randomBytes?: (count: number) => Uint8Array;
  openMachine?: (options: MachineOptions) => Promise<Machine>;
}

/** Recovers what a former agent left, then keeps pools and watches going until it is disposed; VMs stay. */
export async function openAgent({ config, logger, seize, signal, world = {} }: AgentOptions): Promise<Agent> {
  await using held = new AsyncDisposableStack();
  const { clock = systemClock, openMachine = openMachineOf(config, clock) } = world;
  const { dataDir } = config;
  await mkdir(dataDir, { recursive: true, mode: 0o700 });
  held.use(await (seize === undefined ? DataLock.acquire(dataDir) : DataLock.seize(dataDir, seize.graceMs)));

  const machine = await openMachine({ config, logger, signal });
  const { vmm, vmmProbe, rootDisk, network, guests: envd, images } = machine;
  held.defer(() => vmm.close());
  held.defer(() => envd.close());
  if (vmm.kind === "simulated") {
    logger.warn({ vmm: vmm.kind }, "SIMULATED: this agent runs no guests; never use it in production");
  }

  const failpoints = new Failpoints({
    ...config.failpoints,
    known: [...FAILPOINTS, ...credentialFailpoints()],
  });
  // The store builds in places that the manager makes, and the manager is opened with the store.
  const opened = Promise.withResolvers<SandboxManager>();
  opened.promise.catch(() => undefined); // thrown from openSandboxManager below
  let inUse: () => ReadonlySet<WarmKey> = () => {
    throw new RookeryError("unavailable", "the agent is still starting");
  };
  const warmImages = await WarmImageStore.open({
    dataDir,
    images,
    vmm,
    rootDisk,
    network,
    guest: envd,
    places: placeMaker(opened.promise.then((manager) => manager.places)),
    budgetBytes: config.warmDiskBytes,
    inUse: () => inUse(),
    nowMs: () => clock.nowMs(),
    randomBytes: world.randomBytes ?? randomBytes,
    onProgress: ({ image, shape, step, message }) => logger.info({ image, ...shape, step }, message),
  });
  const compat = (fingerprint: string): string => compatOf({ vmm, rootDisk, network }, fingerprint);
  const snapshotStore = await openSnapshotStore(config, {
    warmImages,
    rootDisk,
    compatOf: compat,
    logger,
    clock,
  });
  held.defer(() => snapshotStore?.close());
  try {
    const manager = await openSandboxManager({
      config: {
        ...MANAGER_DEFAULTS,
        dataDir,
        socketRoot: config.runtimeDir,
        cgroupPrefix: `${config.cgroup}/`,
        uidBase: machine.uidBase,
        maxSlots: config.maxSlots,
        pool: { ...MANAGER_DEFAULTS.pool, size: config.poolSize },
        workLimit: config.workLimit === 0 ? 2 * availableParallelism() : config.workLimit,
        maxSandboxes: config.maxSandboxes,
        memoryBudgetMb: Math.floor((totalmem() / (1 << 20)) * (config.memoryPercent / 100)),
        diskReserveBytes: config.diskReserveBytes,
        snapshotCacheBytes: config.snapshotDiskBytes,
        reaperIntervalMs: config.intervals.reaperMs,
        hang: { ...MANAGER_DEFAULTS.hang, intervalMs: config.intervals.hangWatchMs },
      },
      clock,
      randomBytes: world.randomBytes ?? randomBytes,
      logger,
      host: machine.host,
      vmm,
      rootDisk,
      network,
      cgroups: machine.cgroups,
      warmImages,
      snapshotStore: snapshotStore?.snapshots,
      guest: envd,
      failpoints,
    });
    held.defer(() => manager.close());
    inUse = () => manager.warmKeysInUse();
    opened.resolve(manager);
    const resources = held.move();
    return {
      manager,
      envd,
      failpoints,
      vmm,
      vmmProbe,
      rootDisk,
      network,
      snapshotSharing: async () => ({
        compat: compat(await vmm.fingerprint(signal)),
        storeId: await snapshotStore?.snapshots.storeId(AbortSignal.timeout(STORE_LOOK_MS)),
      }),
      [Symbol.asyncDispose]: () => resources.disposeAsync(),
    };
  } catch (cause) {
    opened.reject(cause);
    throw cause;
  }
}

function openMachineOf(config: Config, clock: Clock): (options: MachineOptions) => Promise<Machine> {
  const { dataDir, simulatedSeed } = config;
  if (config.drivers.vmm === "simulated") {
    return () => openSimulatedHost({ dataDir, clock, random: seededRandom(simulatedSeed) });
  }
  return async (options) => {
    await refuseSimulatedData(dataDir);
    return await openRealMachine(options);
  };
}

interface SharedSnapshots {
  store: ObjectStore;
  snapshots: StoredSnapshots;
  close(): void;
}

/** Undefined: none is configured, or this host's disks cannot be shared. */
async function openSnapshotStore(
  config: Config,
  parts: Pick<SnapshotStoreOptions, "warmImages" | "rootDisk" | "compatOf"> & {
    logger: Logger;
    clock: Clock;
  },
): Promise<SharedSnapshots | undefined> {
  if (config.objectStore === undefined) return undefined;
  if (parts.rootDisk.adoptLayer === undefined) {
    parts.logger.warn({ rootDisk: parts.rootDisk.kind }, "these disks stay on their host: no object store");
    return undefined;
  }
  const store = await openObjectStore(config.objectStore);
  const snapshots = await StoredSnapshots.open({
    ...parts,
    store,
    dataDir: config.dataDir,
    imagesDir: config.imagesDir,
    nowMs: () => parts.clock.nowMs(),
    sleep: (ms, signal) => sleep(parts.clock, ms, signal),
  });
  return { store, snapshots, close: () => store.close() };
}

function placeMaker(places: Promise<Places>): PlaceMaker {
  return {
    async make(shape, signal) {
      const maker = await places;
      const place = await maker.make(shape, signal);
      const { envdHost: host, envdPort: port } = place.record.lease;
      return {
        vm: place.vm,
        envd: { host, port },
        record: (vm) => maker.recordProcess(place, vm),
        release: () => maker.release(place.record, {}),
      };
    },
  };
}

function credentialFailpoints(): string[] {
  return [...REGISTER_FAILPOINTS, ...LINK_FAILPOINTS, ...END_FAILPOINTS].flatMap((name) => [
    `${name}.before`,
    `${name}.after`,
  ]);
}
