/**
 * The drivers of the three seams, by name: the only place that knows which
 * there are. Best first; the first whose probe succeeds is taken, unless the
 * configuration names one.
 */
import { join } from "node:path";
import { RookeryError } from "@rookery/protocol/errors";
import type { Config } from "./config.ts";
import type { Probe } from "./doctor/doctor.ts";
import type { GuestNetworkDriver } from "./guest-network/guest-network.ts";
import { NetnsNetworks } from "./guest-network/netns.ts";
import { hostResolvers } from "./guest-network/resolvers.ts";
import type { InstanceTag } from "./guest-network/slots.ts";
import { openSimulatedNetwork } from "./guest-network/simulated.ts";
import { UserNetworks } from "./guest-network/user.ts";
import { probeCgroups } from "./host/cgroup.ts";
import { probeImageBuilder } from "./image/definitions.ts";
import { Qcow2RootDisks } from "./root-disk/qcow2.ts";
import type { RootDiskDriver } from "./root-disk/root-disk.ts";
import { openSimulatedDisks } from "./root-disk/simulated.ts";
import { openQemuDriver } from "./vmm/qemu/qemu-driver.ts";
import { openSimulatedVmm } from "./vmm/simulated.ts";
import type { VmmDriver } from "./vmm/vmm.ts";

/** envd's port in every guest (E2B's protocol). */
const ENVD_PORT = 49_983;

export interface Drivers {
  vmm: readonly VmmDriver[];
  rootDisk: readonly RootDiskDriver[];
  network: readonly GuestNetworkDriver[];
}

export async function openDrivers(config: Config, tag: InstanceTag): Promise<Drivers> {
  const { dataDir, maxSlots: slots } = config;
  if (config.drivers.vmm === "simulated") return simulatedDrivers(dataDir);
  const resolvers = config.resolvers.length > 0 ? config.resolvers : await hostResolvers();
  return {
    vmm: [openQemuDriver({ dataDir })],
    rootDisk: [new Qcow2RootDisks({ dataDir })],
    network: [
      new NetnsNetworks({ tag, slots, resolvers, envdPort: ENVD_PORT }),
      new UserNetworks({ tag, slots, envdPort: ENVD_PORT }),
    ],
  };
}

/** Only for who asked for them by name: they are in no list that `auto` goes through. */
function simulatedDrivers(dataDir: string): Drivers {
  const noTrouble = (): void => undefined;
  return {
    vmm: [openSimulatedVmm()],
    rootDisk: [openSimulatedDisks(noTrouble)],
    network: [openSimulatedNetwork(join(dataDir, "simulated", "networks"), noTrouble)],
  };
}

interface Driver {
  kind: string;
  probe(signal: AbortSignal): Promise<{ ok: boolean; reason?: string }>;
}

/** Throws `host_error` with every reason when none works. */
export async function chooseDriver<D extends Driver>(
  seam: string,
  drivers: readonly D[],
  wanted: D["kind"] | "auto",
  signal: AbortSignal,
): Promise<D> {
  const reasons: string[] = [];
  for (const driver of drivers) {
    if (wanted !== "auto" && driver.kind !== wanted) continue;
    const { ok, reason } = await driver.probe(signal);
    if (ok) return driver;
    reasons.push(`${driver.kind}: ${reason ?? "does not work here"}`);
  }
  throw new RookeryError("host_error", `No ${seam} driver works on this host. ${reasons.join("; ")}`);
}

/** What `doctor` asks of drivers, image pipeline and cgroups. */
export function driverProbes(drivers: Drivers): Probe[] {
  const simple = (area: string, driver: Driver): Probe => ({
    area,
    name: driver.kind,
    required: true,
    run: async (signal) => {
      const { ok, reason } = await driver.probe(signal);
      const verdict = !ok ? "fails" : driver.kind === "simulated" ? "limited" : "works";
      return { verdict, detail: reason ?? (ok ? "ready" : "does not work here") };
    },
  });
  return [
    ...drivers.vmm.map((driver): Probe => ({
      area: "vmm",
      name: driver.kind,
      required: true,
      run: async (signal) => {
        const { ok, acceleration, version, secure, reason } = await driver.probe(signal);
        const facts = [version, acceleration, reason].filter((fact) => fact !== undefined);
        const verdict = !ok ? "fails" : secure === true ? "works" : "limited";
        const simulated = driver.kind === "simulated";
        return { verdict, detail: facts.join("; "), secure: secure === true, simulated };
      },
    })),
    ...drivers.rootDisk.map((driver) => simple("root disk", driver)),
    ...drivers.network.map((driver) => simple("network", driver)),
    {
      area: "images",
      name: "builder",
      required: false,
      run: async () => {
        const { ok, reason } = await probeImageBuilder();
        return { verdict: ok ? "works" : "fails", detail: reason ?? "guest images can be built here" };
      },
    },
    {
      area: "host",
      name: "cgroups",
      required: false,
      run: async () => {
        const { ok, version, controllers, reason } = await probeCgroups();
        return {
          verdict: ok ? "works" : "limited",
          detail: reason ?? `${version}: ${controllers.join(", ")}`,
        };
      },
    },
  ];
}
