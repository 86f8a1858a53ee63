/**
 * Guest networks inside the VMM (SLIRP), for hosts where the agent is not root.
 *
 * `restrict=on` keeps the guest from everything, the host's loopback above all,
 * so it has no way out and no names either; envd is reached through one
 * loopback port of the host a slot. Nothing is made on the host: the port
 * belongs to the VMM and ends with it.
 */
import { once } from "node:events";
import { createServer } from "node:net";
import { isErrno } from "../host/errno.ts";
import { CommandError, run } from "../host/run.ts";
import type { Slot } from "../ids.ts";
import type { GuestAddressing, GuestNetworkDriver, NetworkLease } from "./guest-network.ts";
import { GUEST } from "./nft-rules.ts";
import type { InstanceTag } from "./slots.ts";

const LOOPBACK = "127.0.0.1";
/** Below the ports that the kernel gives to clients (ip_local_port_range begins at 32768). */
const FIRST_PORT = 20_000;
const LAST_PORT = 32_767;

export interface UserOptions {
  tag: InstanceTag;
  slots?: number;
  /** First of `slots` ports; follows from the tag unless given, so that two agents differ. */
  firstPort?: number;
  envdPort: number;
}

export class UserNetworks implements GuestNetworkDriver {
  readonly kind = "user";
  readonly addressing: GuestAddressing = {
    addressCidr: "10.0.2.15/24",
    gateway: "10.0.2.2",
    nameservers: [],
  };
  readonly #slots: number;
  readonly #firstPort: number;
  readonly #envdPort: number;

  constructor({ tag, slots = 512, firstPort, envdPort }: UserOptions) {
    const places = Math.floor((LAST_PORT + 1 - FIRST_PORT) / slots);
    if (places < 1) throw new Error(`${slots} slots: there are ${LAST_PORT + 1 - FIRST_PORT} ports for them`);
    this.#slots = slots;
    this.#firstPort = firstPort ?? FIRST_PORT + slots * (Number.parseInt(tag, 16) % places);
    this.#envdPort = envdPort;
    if (this.#firstPort < 1 || this.#firstPort + slots > 65_536)
      throw new Error(`${firstPort}: ports end at 65535`);
  }

  async probe(signal: AbortSignal): Promise<{ ok: boolean; reason?: string }> {
    const qemu = `qemu-system-${process.arch === "arm64" ? "aarch64" : "x86_64"}`;
    try {
      await run(
        [
          qemu,
          "-M",
          "none",
          "-nodefaults",
          "-display",
          "none",
          "-monitor",
          "stdio",
          "-netdev",
          "user,id=n0,restrict=on",
        ],
        { input: "quit\n", signal },
      );
    } catch (cause) {
      signal.throwIfAborted();
      if (cause instanceof CommandError && isErrno(cause.cause, "ENOENT"))
        return { ok: false, reason: `${qemu} is not installed` };
      return {
        ok: false,
        reason: `this QEMU has no user-mode network: ${cause instanceof Error ? cause.message : ""}`,
      };
    }
    if (await isFree(this.#firstPort)) return { ok: true };
    // Either a guest of ours or a stranger: `up` will tell.
    return { ok: true, reason: `port ${this.#firstPort} of ${LOOPBACK}, the first for guests, is in use` };
  }

  plan(slot: Slot, uid: number): NetworkLease {
    if (slot < 0 || slot >= this.#slots) throw new Error(`slot ${slot}: there are ${this.#slots}`);
    const hostPort = this.#firstPort + slot;
    const forwards = [{ hostPort, guestPort: this.#envdPort }];
    const nic = { kind: "user" as const, mac: GUEST.mac, forwards };
    return { driver: this.kind, slot, uid, nic, envdHost: LOOPBACK, envdPort: hostPort };
  }

  /** Only looks whether the port is there to take: the VMM opens it. */
  async up(lease: NetworkLease, signal: AbortSignal): Promise<void> {
    signal.throwIfAborted();
    if (await isFree(lease.envdPort)) return;
    throw new Error(
      `port ${lease.envdPort} of ${LOOPBACK} is in use: configure another first port for guests`,
    );
  }

  async down(_lease: NetworkLease, signal: AbortSignal): Promise<void> {
    signal.throwIfAborted();
  }

  async downSlot(_slot: Slot, signal: AbortSignal): Promise<void> {
    signal.throwIfAborted();
  }

  async listOwnedSlots(signal: AbortSignal): Promise<Slot[]> {
    signal.throwIfAborted();
    return [];
  }
}

async function isFree(port: number): Promise<boolean> {
  const server = createServer();
  try {
    server.listen({ port, host: LOOPBACK, exclusive: true });
    await once(server, "listening");
    return true;
  } catch (cause) {
    if (isErrno(cause, "EADDRINUSE")) return false;
    throw cause;
  } finally {
    server.close();
  }
}
