/**
 * Which host a new sandbox goes to. Filters say which may; a strategy picks one.
 *
 * Capacity is filtered by what a host has at all: how much of it is free only
 * the host knows, and it refuses what it has no room for. The caller then asks
 * again without it.
 */
import { isLoadable } from "@rookery/protocol/memory-compat";
import type { HostRecord } from "../db/hosts.ts";
import type { HostId } from "../model/ids.ts";

export interface PlacementRequest {
  memoryMb: number;
  diskMb: number;
  /** Undefined: of an image that every host has or builds. */
  snapshot?: SnapshotPlaces | undefined;
  /** Kind of VMM that its template was made with. */
  vmm?: string | undefined;
}

/** Where a snapshot lies, and who can load it. */
export interface SnapshotPlaces {
  hostIds: readonly HostId[];
  compat?: string | undefined;
  storeId?: string | undefined;
}

export interface Scheduler {
  /** Undefined: none of them. */
  pick(request: PlacementRequest, hosts: readonly HostRecord[]): HostRecord | undefined;
}

type Strategy = (hosts: readonly HostRecord[], request: PlacementRequest) => HostRecord | undefined;
type Filter = (host: HostRecord, request: PlacementRequest) => boolean;

const FILTERS: Record<string, Filter> = {
  isOnline: (host) => host.status === "online",
  isNotDraining: (host) => !host.draining,
  hasCapacity: (host, { memoryMb, diskMb }) =>
    memoryMb <= (host.memoryMb ?? 0) && diskMb <= (host.diskMb ?? 0),
  hasVmm: (host, { vmm }) => vmm === undefined || host.drivers?.["vmm"] === vmm,
  hasSnapshot: (host, { snapshot }) =>
    snapshot === undefined || snapshot.hostIds.includes(host.id) || canFetch(host, snapshot),
  canLoadSnapshot: ({ snapshotCompat }, { snapshot }) =>
    snapshot?.compat === undefined ||
    snapshotCompat === undefined ||
    isLoadable(snapshot.compat, snapshotCompat),
};

const ALL = Object.values(FILTERS);

/** A host that does not say what it can load fetches nothing of others. */
function canFetch({ storeId, snapshotCompat }: HostRecord, snapshot: SnapshotPlaces): boolean {
  const { compat } = snapshot;
  if (storeId === undefined || storeId !== snapshot.storeId) return false;
  return compat !== undefined && snapshotCompat !== undefined && isLoadable(compat, snapshotCompat);
}

/** Each in turn, by id: whoever was asked last comes last. */
function roundRobin(): Strategy {
  let last = "";
  return (hosts) => {
    const next = firstById(hosts.filter(({ id }) => id > last)) ?? firstById(hosts);
    if (next) last = next.id;
    return next;
  };
}

/** In one pass: with hundreds of hosts, each create takes it. */
function firstById(hosts: readonly HostRecord[]): HostRecord | undefined {
  let first: HostRecord | undefined;
  for (const host of hosts) if (first === undefined || host.id < first.id) first = host;
  return first;
}

/**
 * The one with the smallest part of its memory in use, by its own last word and
 * what was placed there since: a burst comes between two heartbeats.
 */
function leastLoaded(): Strategy {
  const placed = new Map<HostId, { since: number; memoryMb: number }>();
  const placedOn = ({ id, lastHeartbeatAt }: HostRecord): { since: number; memoryMb: number } => {
    const since = lastHeartbeatAt?.getTime() ?? 0;
    const known = placed.get(id);
    return known?.since === since ? known : { since, memoryMb: 0 };
  };
  const used = (host: HostRecord): number =>
    ((host.load?.memoryMbUsed ?? 0) + placedOn(host).memoryMb) / (host.memoryMb ?? 1);
  return (hosts, { memoryMb }) => {
    let pick: HostRecord | undefined;
    for (const host of hosts) {
      const more = pick ? used(host) - used(pick) : -1;
      if (more < 0 || (more === 0 && pick && host.id < pick.id)) pick = host;
    }
    if (pick) {
      const { since, memoryMb: before } = placedOn(pick);
      placed.set(pick.id, { since, memoryMb: before + memoryMb });
    }
    return pick;
  };
}

export const STRATEGY_NAMES = ["round-robin", "least-loaded"] as const;
type StrategyName = (typeof STRATEGY_NAMES)[number];

const STRATEGIES: Record<StrategyName, () => Strategy> = {
  "round-robin": roundRobin,
  "least-loaded": leastLoaded,
};

export function newScheduler(name: StrategyName): Scheduler {
  const strategy = STRATEGIES[name]();
  return {
    pick(request, hosts) {
      const admitted = hosts.filter((host) => ALL.every((admits) => admits(host, request)));
      // Who has the snapshot already comes first: the others fetch it.
      const near = admitted.filter(({ id }) => request.snapshot?.hostIds.includes(id));
      return strategy(near.length > 0 ? near : admitted, request);
    },
  };
}
