/** Who speaks to whom, as packet filters know it. */
import type { Direction } from "../schedule.ts";
import { AGENT_PORT, API_PORT, DATABASE_PORT, FRONT_DOOR_PORT } from "./settings.ts";
import type { Node, Topology } from "./topology.ts";

/** Both ends, by address; `port` is the listener's. */
export interface Path {
  client: string;
  server: string;
  port: number;
}

/** Between a host and all replicas, or one of them. */
export function hostPaths(
  { hosts, replicas, doors, center }: Topology,
  { host, replica, direction }: { host: number; replica?: number; direction: Direction },
): Path[] {
  const server = hosts[host]!.address;
  const concerned = replica === undefined ? replicas : [replicas[replica]!];
  const commands = concerned.map(({ address: client }) => ({ client, server, port: AGENT_PORT }));
  const heartbeats =
    replica === undefined
      ? [{ client: server, server: center, port: FRONT_DOOR_PORT }]
      : [{ client: doors[host]!, server: replicas[replica]!.address, port: API_PORT }];
  return [...(direction === "heartbeats" ? [] : commands), ...(direction === "commands" ? [] : heartbeats)];
}

export function callerPaths({ callers: client, replicas }: Topology): Path[] {
  return replicas.map(({ address: server }) => ({ client, server, port: API_PORT }));
}

export function databasePaths({ center: server }: Topology, replicas: readonly Node[]): Path[] {
  return replicas.map(({ address: client }) => ({ client, server, port: DATABASE_PORT }));
}
