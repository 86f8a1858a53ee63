/**
 * The network of a run: a namespace with one link for each host and each
 * replica, and the enclosure's own namespace as the router between them, where
 * database, front door and callers have addresses, and where packets are
 * filtered.
 */
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { run } from "./enclosure.ts";

export interface Node {
  name: string;
  address: string;
  /** Of the router's end of its link. */
  link: string;
  /** File that holds its network namespace. */
  namespace: string;
}

export interface Topology {
  hosts: Node[];
  replicas: Node[];
  /** Of the database and the front door. */
  center: string;
  callers: string;
  /** What the front door calls replicas from, by host: so that a filter knows for whom. */
  doors: string[];
}

/** Runs side by side differ by `slot`. */
export function centerOf(slot: number): string {
  return `10.${100 + slot}.0.1`;
}

export function makeTopology(
  dir: string,
  { slot, hosts, replicas }: { slot: number; hosts: number; replicas: number },
): Topology {
  const net = `10.${100 + slot}`;
  const center = centerOf(slot);
  const callers = `${net}.0.2`;
  const doors = Array.from({ length: hosts }, (_, index) => `${net}.3.${index + 1}`);
  for (const address of [center, callers, ...doors])
    run("ip", "address", "add", `${address}/32`, "dev", "lo");
  const node = (kind: string, subnet: number) => (_: unknown, index: number) =>
    makeNode(dir, { name: `${kind}${index}`, slot, address: `${net}.${subnet}.${index + 1}`, center });
  return {
    hosts: Array.from({ length: hosts }, node("host", 1)),
    replicas: Array.from({ length: replicas }, node("replica", 2)),
    center,
    callers,
    doors,
  };
}

/** The links go with their other ends. */
export function removeTopology({ hosts, replicas, center, callers, doors }: Topology): void {
  for (const { link, namespace } of [...hosts, ...replicas]) {
    run("ip", "link", "delete", link);
    run("umount", namespace);
  }
  for (const address of [center, callers, ...doors])
    run("ip", "address", "delete", `${address}/32`, "dev", "lo");
}

function makeNode(
  dir: string,
  { name, slot, address, center }: { name: string; slot: number; address: string; center: string },
): Node {
  const namespace = join(dir, `${name}.net`);
  const link = `rkf${slot}${name.replace("replica", "r").replace("host", "h")}`;
  writeFileSync(namespace, "");
  run("unshare", `--net=${namespace}`, "true");
  const script = [
    "ip link set lo up",
    `ip link add eth0 type veth peer name ${link} netns 1`,
    `ip address add ${address}/32 dev eth0`,
    "ip link set eth0 up",
    `ip route add ${center} dev eth0`,
    `ip route add default via ${center}`,
  ];
  run("nsenter", `--net=${namespace}`, "sh", "-ec", script.join("\n"));
  run("ip", "link", "set", link, "up");
  run("ip", "route", "add", address, "dev", link, "src", center);
  return { name, address, link, namespace };
}
