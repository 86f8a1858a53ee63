/**
 * What must hold once faults are over and the dust has settled. Pure: it holds
 * what callers were told against what the database and the machines say.
 */
import type { History } from "./history.ts";
import type { MachineFacts, Observed, SandboxRow, World } from "./world.ts";

export interface Violation {
  what: string;
  [detail: string]: unknown;
}

const FINAL = new Set(["stopped", "error"]);
const SETTLED = new Set(["running", "paused", "stopped", "error"]);

export function judge(
  history: History,
  seen: Observed,
  {
    doubleCredentials,
    staleCommands,
    brokenPrograms,
  }: Pick<World, "doubleCredentials" | "staleCommands" | "brokenPrograms">,
): Violation[] {
  const rows = new Map(seen.sandboxes.map((row) => [row.id, row]));
  return [
    ...history.wrongAnswers.map(({ what, ...details }) => ({ what: `wrong answer: ${what}`, ...details })),
    ...doubleCredentials.map((credential) => ({ what: "a credential was good twice", credential })),
    ...staleCommands.map((command) => ({ what: "a late command was carried out", command })),
    ...brokenPrograms.map((program) => ({ what: "a program broke by itself", program })),
    ...judgeCreates(history, seen, rows),
    ...judgeRows(seen),
    ...judgeMachines(seen, rows),
    ...judgeMemories(history, seen, rows),
    ...judgeSnapshots(seen),
    ...seen.hosts
      .filter(({ status }) => status !== "online")
      .map(({ id, status }) => ({ what: "a host did not come back", host: id, status })),
    ...seen.teams
      .filter(({ live, counted }) => live !== counted)
      .map(({ id, live, counted }) => ({ what: "the quota's count is wrong", team: id, live, counted })),
  ];
}

function judgeCreates(history: History, seen: Observed, rows: ReadonlyMap<string, SandboxRow>): Violation[] {
  const found: Violation[] = [];
  for (const { tag, key, ids } of history.creates) {
    for (const id of ids) if (!rows.has(id)) found.push({ what: "an accepted create has no row", id });
    if (key === undefined) continue;
    if (ids.size > 1) found.push({ what: "one idempotency key, two answers", key, ids: [...ids] });
    const made = seen.sandboxes.filter((row) => row.tag === tag && row.hasStarted);
    if (made.length > 1) {
      found.push({ what: "one idempotency key made two sandboxes", key, ids: made.map(({ id }) => id) });
    }
  }
  for (const id of history.destroyed) {
    const status = rows.get(id)?.status;
    if (status !== undefined && !FINAL.has(status))
      found.push({ what: "a destroyed sandbox is not over", id, status });
  }
  return found;
}

function judgeRows({ sandboxes, machines, hosts }: Observed): Violation[] {
  const found: Violation[] = [];
  const byHost = new Map(machines.map((machine) => [machine.hostId, machine]));
  for (const { id, status, hostId } of sandboxes) {
    if (!SETTLED.has(status)) found.push({ what: "a row did not settle", id, status, host: hostId });
    if (FINAL.has(status) || hostId === undefined) continue;
    const machine = byHost.get(hostId);
    const there = machine?.sandboxes.find((one) => one.id === id);
    if (machine === undefined || there === undefined) {
      found.push({ what: "a live row without a sandbox", id, status, host: hostId });
      continue;
    }
    if (there.phase !== status) found.push({ what: "row and host disagree", id, status, phase: there.phase });
    if (status !== "running") continue;
    const vm = machine.vms.find(({ vmId }) => vmId === there.vmId);
    if (vm?.state !== "running")
      found.push({ what: "a running row without a VM", id, host: hostId, vm: vm?.state });
  }
  for (const host of hosts) {
    const machine = byHost.get(host.id);
    if (machine === undefined) continue;
    const { eventLogId, lastEvent } = machine;
    if (lastEvent === 0n || (host.eventLogId === eventLogId && host.acknowledgedEvent === lastEvent))
      continue;
    const read = `${host.eventLogId === eventLogId ? host.acknowledgedEvent : "another log"} of ${lastEvent}`;
    found.push({ what: "events were not read to their end", host: host.id, read });
  }
  return found;
}

function judgeMachines({ machines }: Observed, rows: ReadonlyMap<string, SandboxRow>): Violation[] {
  const found: Violation[] = [];
  const places = new Map<string, string[]>();
  for (const machine of machines) {
    const { hostId } = machine;
    for (const { id, phase } of machine.sandboxes) {
      places.set(id, [...(places.get(id) ?? []), hostId]);
      const row = rows.get(id);
      if (row === undefined) found.push({ what: "a sandbox without a row", id, host: hostId, phase });
      else if (FINAL.has(row.status)) {
        found.push({ what: "a final row holds resources", id, status: row.status, host: hostId, phase });
      } else if (row.hostId !== hostId) {
        found.push({
          what: "a sandbox on a host that is not its own",
          id,
          host: hostId,
          own: row.hostId,
          phase,
        });
      }
    }
    for (const { vmId, corrupt } of machine.vms) {
      if (corrupt) found.push({ what: "a guest's disk does not fit its memory", vmId, host: hostId });
    }
    for (const leak of machine.leaks) found.push({ what: "something leaked", host: hostId, leak });
  }
  for (const [id, hosts] of places)
    if (hosts.length > 1) found.push({ what: "a sandbox on two hosts", id, hosts });
  return found;
}

/** What a guest said that it wrote down, a running guest still knows, whatever it went through. */
function judgeMemories(
  history: History,
  { machines }: Observed,
  rows: ReadonlyMap<string, SandboxRow>,
): Violation[] {
  const found: Violation[] = [];
  for (const [id, written] of history.written) {
    if (rows.get(id)?.status !== "running") continue;
    const memory = memoryOf(machines, id);
    if (memory === undefined) continue;
    const lost = [...written].filter((note) => memory[`note-${note}`] !== id);
    if (lost.length > 0) found.push({ what: "a guest forgot what it had written", id, lost });
  }
  return found;
}

function memoryOf(
  machines: readonly MachineFacts[],
  id: string,
): Readonly<Record<string, string>> | undefined {
  for (const { sandboxes, vms } of machines) {
    const vmId = sandboxes.find((one) => one.id === id)?.vmId;
    const vm = vms.find((one) => one.vmId === vmId);
    if (vm !== undefined) return vm.memory;
  }
  return undefined;
}

function judgeSnapshots({ snapshots, machines }: Observed): Violation[] {
  const found: Violation[] = [];
  const rows = new Map(snapshots.map((row) => [row.id, row]));
  for (const { id, status, hostId } of snapshots) {
    if (status !== "ready") found.push({ what: "a snapshot did not settle", id, status });
    const machine = machines.find((one) => one.hostId === hostId);
    if (status === "ready" && machine?.snapshots.includes(id) === false) {
      found.push({ what: "a ready snapshot is not on its host", id, host: hostId });
    }
  }
  for (const machine of machines) {
    for (const id of machine.snapshots) {
      if (!rows.has(id)) found.push({ what: "a snapshot without a row", id, host: machine.hostId });
    }
  }
  return found;
}
