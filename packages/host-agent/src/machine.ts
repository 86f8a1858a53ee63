/**
 * What an agent stands on: the drivers of its seams, and the few things that it
 * asks of its host otherwise. There is the real machine, here, and a simulated
 * one (simulated/), which takes nothing of the host but a directory.
 */
import { strict as assert } from "node:assert";
import type { Logger } from "pino";
import type { Config } from "./config.ts";
import { chooseDriver, openDrivers } from "./drivers.ts";
import type { GuestNetworkDriver } from "./guest-network/guest-network.ts";
import { instanceTagOf, isSlot, uidOfSlot } from "./guest-network/slots.ts";
import type { InstanceTag } from "./guest-network/slots.ts";
import { EnvdClient } from "./guest/envd-client.ts";
import type { Guests } from "./guest/envd-client.ts";
import { probeCgroups } from "./host/cgroup.ts";
import { run } from "./host/run.ts";
import type { ImageProgress } from "./image/guest-image.ts";
import { openImageStore } from "./image/image-store.ts";
import type { ImageStore } from "./image/image-store.ts";
import type { RootDiskDriver } from "./root-disk/root-disk.ts";
import type { Deps } from "./sandbox-manager/index.ts";
import { openHostFacts } from "./vm-pool/host-facts.ts";
import { hostCgroups, noCgroups } from "./vm-pool/vm-cgroups.ts";
import type { VmmDriver, VmmProbe } from "./vmm/vmm.ts";

export interface Machine {
  vmm: VmmDriver;
  vmmProbe: VmmProbe;
  rootDisk: RootDiskDriver;
  network: GuestNetworkDriver;
  host: Deps["host"];
  cgroups: Deps["cgroups"];
  /** uid of slot 0; undefined where VMMs run under the agent's own. */
  uidBase: number | undefined;
  guests: Guests;
  images: Pick<ImageStore, "ensure">;
}

export interface MachineOptions {
  config: Config;
  logger: Logger;
  signal: AbortSignal;
}

export async function openRealMachine({ config, logger, signal }: MachineOptions): Promise<Machine> {
  const tag = await instanceTagOf(config.dataDir);
  const drivers = await openDrivers(config, tag);
  const vmm = await chooseDriver("VMM", drivers.vmm, config.drivers.vmm, signal);
  const rootDisk = await chooseDriver("root disk", drivers.rootDisk, config.drivers.rootDisk, signal);
  const network = await chooseDriver("network", drivers.network, config.drivers.network, signal);
  await network.prepareHost?.(signal);
  const isRoot = process.getuid?.() === 0;
  const cgroups = await probeCgroups();
  if (!cgroups.ok) logger.warn({ reason: cgroups.reason }, "not every limit of a sandbox can be kept");
  return {
    vmm,
    vmmProbe: await vmm.probe(signal),
    rootDisk,
    network,
    host: await openHostFacts(),
    cgroups: isRoot && cgroups.version !== "none" ? hostCgroups : noCgroups,
    uidBase: isRoot ? (config.uidBase ?? firstUid(tag)) : undefined,
    guests: new EnvdClient(),
    images: await openImages(config, (event) => {
      logger.info({ image: event.image, step: event.step }, event.message);
    }),
  };
}

/** The image store alone: what `image build` and `image list` need. */
export function openImages(config: Config, onProgress: (event: ImageProgress) => void): Promise<ImageStore> {
  return openImageStore({
    imagesDir: config.imagesDir,
    guestFilesDir: config.guestFilesDir,
    envdBundleDir: config.envdBundleDir,
    nodeBinary: config.guestNode,
    run,
    clock: { now: () => Date.now() },
    onProgress,
  });
}

function firstUid(tag: InstanceTag): number {
  const first = 0;
  assert(isSlot(first, 1));
  return uidOfSlot(tag, first);
}
