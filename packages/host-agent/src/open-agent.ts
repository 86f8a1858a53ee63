/**
 * The agent's core, put together from configuration: lock, drivers, images,
 * guests, manager. What serves (RPC, heartbeats) is built on top of it by
 * `serve.ts`; `destroy-all` uses it bare.
 */
import { strict as assert } from "node:assert";
import { randomBytes } from "node:crypto";
import { mkdir } from "node:fs/promises";
import { availableParallelism, totalmem } from "node:os";
import { RookeryError } from "@rookery/protocol/errors";
import type { Logger } from "pino";
import type { Config } from "./config.ts";
import { REFRESH_FAILPOINTS } from "./control-plane/control-plane-link.ts";
import { REGISTER_FAILPOINTS } from "./control-plane/register.ts";
import { chooseDriver, openDrivers } from "./drivers.ts";
import { Failpoints } from "./failpoints/failpoints.ts";
import type { GuestNetworkDriver } from "./guest-network/guest-network.ts";
import { instanceTagOf, isSlot, uidOfSlot } from "./guest-network/slots.ts";
import type { InstanceTag } from "./guest-network/slots.ts";
import { EnvdClient } from "./guest/envd-client.ts";
import { probeCgroups } from "./host/cgroup.ts";
import { DataLock } from "./host/data-lock.ts";
import { run } from "./host/run.ts";
import type { WarmKey } from "./ids.ts";
import type { ImageProgress } from "./image/guest-image.ts";
import { openImageStore } from "./image/image-store.ts";
import type { ImageStore } from "./image/image-store.ts";
import type { RootDiskDriver } from "./root-disk/root-disk.ts";
import { FAILPOINTS, MANAGER_DEFAULTS, openSandboxManager, systemClock } from "./sandbox-manager/index.ts";
import type { SandboxManager } from "./sandbox-manager/index.ts";
import { openHostFacts } from "./vm-pool/host-facts.ts";
import type { Places } from "./vm-pool/places.ts";
import { hostCgroups, noCgroups } from "./vm-pool/vm-cgroups.ts";
import type { VmmDriver, VmmProbe } from "./vmm/vmm.ts";
import type { PlaceMaker } from "./warm-images/build-warm-image.ts";
import { WarmImageStore } from "./warm-images/warm-image-store.ts";

export interface Agent extends AsyncDisposable {
  manager: SandboxManager;
  envd: EnvdClient;
  failpoints: Failpoints;
  vmm: VmmDriver;
  vmmProbe: VmmProbe;
  rootDisk: RootDiskDriver;
  network: GuestNetworkDriver;
}

export interface AgentOptions {
  config: Config;
  logger: Logger;
  /** Ends an agent that has the data directory, instead of being refused. */
  seize?: { graceMs: number };
  signal: AbortSignal;
}

/** Recovers what a former agent left, then keeps pools and watches going until it is disposed; VMs stay. */
export async function openAgent({ config, logger, seize, signal }: AgentOptions): Promise<Agent> {
  await using held = new AsyncDisposableStack();
  const { dataDir } = config;
  await mkdir(dataDir, { recursive: true, mode: 0o700 });
  held.use(await (seize === undefined ? DataLock.acquire(dataDir) : DataLock.seize(dataDir, seize.graceMs)));

  const tag = await instanceTagOf(dataDir);
  const drivers = await openDrivers(config, tag);
  const vmm = await chooseDriver("VMM", drivers.vmm, config.drivers.vmm, signal);
  held.defer(() => vmm.close());
  const rootDisk = await chooseDriver("root disk", drivers.rootDisk, config.drivers.rootDisk, signal);
  const network = await chooseDriver("network", drivers.network, config.drivers.network, signal);
  const vmmProbe = await vmm.probe(signal);
  await network.prepareHost?.(signal);
  const isRoot = process.getuid?.() === 0;
  const cgroups = await probeCgroups();
  if (!cgroups.ok) logger.warn({ reason: cgroups.reason }, "not every limit of a sandbox can be kept");

  const failpoints = new Failpoints({
    ...config.failpoints,
    known: [...FAILPOINTS, ...credentialFailpoints()],
  });
  const envd = new EnvdClient();
  held.defer(() => envd.close());
  const images = await openImages(config, (event) => {
    logger.info({ image: event.image, step: event.step }, event.message);
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
    nowMs: () => systemClock.nowMs(),
    randomBytes,
    onProgress: ({ image, shape, step, message }) => logger.info({ image, ...shape, step }, message),
  });
  try {
    const manager = await openSandboxManager({
      config: {
        ...MANAGER_DEFAULTS,
        dataDir,
        socketRoot: config.runtimeDir,
        cgroupPrefix: `${config.cgroup}/`,
        uidBase: isRoot ? (config.uidBase ?? firstUid(tag)) : undefined,
        maxSlots: config.maxSlots,
        pool: { ...MANAGER_DEFAULTS.pool, size: config.poolSize },
        workLimit: config.workLimit === 0 ? 2 * availableParallelism() : config.workLimit,
        maxSandboxes: config.maxSandboxes,
        memoryBudgetMb: Math.floor((totalmem() / (1 << 20)) * (config.memoryPercent / 100)),
        diskReserveBytes: config.diskReserveBytes,
        reaperIntervalMs: config.intervals.reaperMs,
        hang: { ...MANAGER_DEFAULTS.hang, intervalMs: config.intervals.hangWatchMs },
      },
      clock: systemClock,
      randomBytes,
      logger,
      host: await openHostFacts(),
      vmm,
      rootDisk,
      network,
      cgroups: isRoot && cgroups.version !== "none" ? hostCgroups : noCgroups,
      warmImages,
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
      [Symbol.asyncDispose]: () => resources.disposeAsync(),
    };
  } catch (cause) {
    opened.reject(cause);
    throw cause;
  }
}

/** The image store alone: what `image build` and `image list` need. */
export function openImages(config: Config, onProgress: (event: ImageProgress) => void): Promise<ImageStore> {
  return openImageStore({
    imagesDir: config.imagesDir,
    guestFilesDir: config.guestFilesDir,
    envdBundleDir: config.envdBundleDir,
    nodeBinary: config.guestNode,
    run,
    clock: { now: () => systemClock.nowMs() },
    onProgress,
  });
}

function firstUid(tag: InstanceTag): number {
  const first = 0;
  assert(isSlot(first, 1));
  return uidOfSlot(tag, first);
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
  return [...REGISTER_FAILPOINTS, ...REFRESH_FAILPOINTS].flatMap((name) => [
    `${name}.before`,
    `${name}.after`,
  ]);
}
