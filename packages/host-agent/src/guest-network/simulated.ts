/**
 * Guest networks of a simulated host: a name for each slot, and nothing behind
 * it. A simulated guest is reached by its port alone, through no socket.
 */
import { mkdir, readdir, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import type { Slot } from "../ids.ts";
import type { GuestNetworkDriver, NetworkLease } from "./guest-network.ts";

/** Never a name that resolves. */
const ENVD_HOST = "simulated.invalid";
const FIRST_PORT = 20_000;

/** Its leases are files in `dir`, named by slot. `trouble` as for the disks. */
export function openSimulatedNetwork(dir: string, trouble: (effect: string) => void): GuestNetworkDriver {
  return {
    kind: "simulated",
    addressing: { addressCidr: "10.0.2.15/24", gateway: "10.0.2.2", nameservers: [] },
    async probe() {
      return { ok: true, reason: "simulated: carries nothing" };
    },
    async prepareHost() {
      await mkdir(dir, { recursive: true });
    },
    plan(slot, uid): NetworkLease {
      const envdPort = FIRST_PORT + slot;
      const nic = { kind: "simulated" as const, mac: "02:00:00:00:00:01", port: envdPort };
      return { driver: "simulated", slot, uid, nic, envdHost: ENVD_HOST, envdPort };
    },
    async up({ slot }) {
      trouble("network.up");
      await writeFile(join(dir, String(slot)), "");
      trouble("network.upped");
    },
    async down({ slot }) {
      trouble("network.down");
      await rm(join(dir, String(slot)), { force: true });
    },
    async downSlot(slot) {
      trouble("network.down");
      await rm(join(dir, String(slot)), { force: true });
    },
    async listOwnedSlots() {
      return (await readdir(dir)).map((name) => Number(name) as Slot);
    },
  };
}
