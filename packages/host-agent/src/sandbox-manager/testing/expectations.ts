/**
 * What must hold on a simulated machine, whatever failed or died before.
 */
import { readdirSync, statSync } from "node:fs";
import { join } from "node:path";
import { expect } from "vitest";
import { isHeld } from "../holding.ts";
import { OLD, type Stage } from "./scenarios.ts";
import { operationOf, sandboxId, specOf } from "./simulated-machine.ts";

/** Nothing without an owner, and nothing owned that is not there. */
export function expectNothingLeaked({ core, machine }: Stage): void {
  const live = [...core.sandboxes.values()].filter(({ placed }) => placed !== undefined);
  const vmIds = live.map(({ placed }) => placed!.place.record.vmId).sort();
  expect(
    machine.processes
      .all()
      .map(({ place }) => place.vmId)
      .sort(),
  ).toEqual(vmIds);
  const traces = machine.traces();
  const namesIn = (dir: string) =>
    traces.flatMap((path) => (path.startsWith(dir) ? [path.slice(dir.length).split("/")[0]!] : []));
  const slots = live.map(({ placed }) => String(placed!.place.record.slot)).sort();
  expect([...new Set(namesIn("host/networks/"))].sort()).toEqual(slots);
  expect([...new Set(namesIn("host/cgroups/"))].sort()).toEqual(vmIds.map((id) => `rookery-test_${id}`));
  expect([...new Set(namesIn("data/vms/"))].sort()).toEqual(vmIds);
  expect([...new Set(namesIn("sockets/"))].sort()).toEqual(vmIds);
  expect([...new Set(namesIn("data/sandboxes/"))].sort()).toEqual([...core.sandboxes.keys()].sort());
  expect([...new Set(namesIn("data/snapshots/"))].sort()).toEqual([...core.snapshots.keys()].sort());
  const layers = new Set(
    [...core.sandboxes.values()]
      .flatMap(({ disk }) => disk?.chain ?? [])
      .concat([...core.snapshots.values()].flatMap(({ chain }) => chain))
      .flatMap((layer) => (layer.kind === "layer" ? [layer.id] : [])),
  );
  expect([...new Set(namesIn("data/layers/"))].sort()).toEqual([...layers].sort());
  for (const process of machine.processes.all()) expect(process.corrupt).toBe(false);
  for (const { disk, placed } of live) {
    // The VM writes to the file that the manifest names, and to no layer.
    const top = statSync(join(disk!.dir, `top-${disk!.chain.length}`));
    const attached = machine.processes.get(placed!.vm.record.pid)!.disk;
    expect(attached.kind === "file-chain" && attached.nodes[0]?.file).toBe(`disk-${top.ino}`);
  }
  for (const { record, phase, placed } of core.sandboxes.values()) {
    if (phase === "running") expect(placed?.vm.state).toBe(isHeld(record) ? "frozen" : "running");
    const files = readdirSync(core.journal.sandboxDir(record.spec.id));
    expect(files.filter((name) => name.startsWith("layer-"))).toEqual(
      record.layer ? [record.layer.name] : [],
    );
    expect(["running", "paused", "failed"]).toContain(phase);
    expect(record.fork).toBeUndefined();
    if (phase !== "running") expect(record.vm).toBeUndefined();
    if (phase === "paused")
      expect(traces).toContain(`data/sandboxes/${record.spec.id}/${record.layer!.name}/manifest.json`);
  }
}

/** The old sandbox is alive, or can be brought back, with all that it remembers. */
export async function expectOldIntact(stage: Stage): Promise<void> {
  const { core, manager, machine } = stage;
  const entry = core.sandboxes.get(OLD)!;
  if (entry.phase === "paused" || isHeld(entry.record)) {
    await manager.resume(operationOf(OLD, Number(entry.record.generation) + 1));
  }
  expect(entry.phase).toBe("running");
  const process = machine.processes.get(entry.placed!.vm.record.pid)!;
  expect(process).toMatchObject({ state: "running", corrupt: false });
  expect(process.guest.memory).toMatchObject({ counter: "7", sandboxId: OLD });
}

/** Every snapshot that there is can be used. */
export async function expectSnapshotsUsable({ core, manager }: Stage): Promise<void> {
  for (const id of core.snapshots.keys()) {
    const child = sandboxId(`child${id.slice(5, 10)}`);
    const source = { kind: "snapshot" as const, snapshotId: id };
    await manager.create(specOf(child, { source }), operationOf(child, 1));
  }
}

export async function destroyEverything({ core, manager, machine }: Stage): Promise<void> {
  expect(await manager.destroyAll()).toEqual([]);
  for (const id of core.snapshots.keys()) await manager.deleteSnapshot(id);
  expect(machine.traces().filter((path) => path.split("/").length > 2)).toEqual([]);
}
