/** What lies on a simulated machine and belongs to nothing, or belongs to something and is not there. */
import { existsSync, readdirSync } from "node:fs";
import type { Core } from "../../../packages/host-agent/src/sandbox-manager/core.ts";
import type { SimulatedMachine } from "../../../packages/host-agent/src/sandbox-manager/testing/simulated-machine.ts";

export function leaksOf(core: Core, machine: SimulatedMachine): string[] {
  const entries = [...core.sandboxes.values()];
  const traces = machine.traces();
  const namesIn = (dir: string): string[] => [
    ...new Set(
      traces.flatMap((path) => (path.startsWith(dir) ? [path.slice(dir.length).split("/")[0]!] : [])),
    ),
  ];
  const live = entries.flatMap(({ placed }) => placed ?? []);
  const vmIds = live.map(({ place }) => place.record.vmId);
  const layers = [
    ...entries.map(({ disk }) => disk?.chain ?? []),
    ...[...core.snapshots.values()].map(({ chain }) => chain),
  ]
    .flat()
    .flatMap((layer) => (layer.kind === "layer" ? [layer.id] : []));
  return [
    ...differences(
      "VM",
      machine.processes.all().map(({ place }) => place.vmId),
      vmIds,
    ),
    ...differences(
      "network",
      namesIn("host/networks/"),
      live.map(({ place }) => String(place.record.slot)),
    ),
    ...differences(
      "cgroup",
      namesIn("host/cgroups/"),
      vmIds.map((id) => `rookery-test_${id}`),
    ),
    ...differences("VM's directory", namesIn("data/vms/"), vmIds),
    ...differences("sockets", namesIn("sockets/"), vmIds),
    ...differences("sandbox's directory", namesIn("data/sandboxes/"), [...core.sandboxes.keys()]),
    ...differences("snapshot's directory", namesIn("data/snapshots/"), [...core.snapshots.keys()]),
    ...differences("disk layer", namesIn("data/layers/"), layers),
    ...entries.flatMap(({ record }) => {
      const files = namesOf(core.journal.sandboxDir(record.spec.id)).filter((name) =>
        name.startsWith("layer-"),
      );
      return differences(`memory layer of ${record.spec.id}`, files, record.layer ? [record.layer.name] : []);
    }),
    ...(core.pool.places.leavingCount > 0 ? [`${core.pool.places.leavingCount} places not taken away`] : []),
  ];
}

function differences(what: string, there: readonly string[], owned: readonly string[]): string[] {
  const has = new Set(there);
  const wanted = new Set(owned);
  return [
    ...[...has].filter((name) => !wanted.has(name)).map((name) => `${what} of nobody: ${name}`),
    ...[...wanted].filter((name) => !has.has(name)).map((name) => `${what} is not there: ${name}`),
  ];
}

/** None where it went while we looked. */
function namesOf(dir: string): string[] {
  return existsSync(dir) ? readdirSync(dir) : [];
}
