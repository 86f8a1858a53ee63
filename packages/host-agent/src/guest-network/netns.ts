/**
 * Guest networks as namespaces (root).
 *
 *   host                     namespace rkTAG-SLOT                    guest
 *   rkTAG-SLOT ══ veth ══ eth0      tap0 169.254.0.22 ── TAP ── 169.254.0.21
 *   10.12.x.y           10.12.x.y+1
 *
 * The host reaches the guest at 10.11.x.y+1 (translated in the namespace; the
 * guest sees its gateway as the sender). The guest's packets leave as its
 * namespace's address, and leave the host as the host's. IPv6 is off.
 *
 * Making one takes three programs, two of them at once: 250 ms where one
 * program a step took 850 ms (2 cores under load 18).
 *
 * What is left to a guest: bandwidth has no limit, and of connections it may
 * hold 4096 and open 500 a second (nft-rules.ts).
 *
 * Invariant: the veth's alias is written last; a namespace whose veth has it is whole.
 */
import { constants } from "node:fs";
import { access, readdir, readFile, writeFile } from "node:fs/promises";
import { isErrno } from "../host/errno.ts";
import { CommandError, run } from "../host/run.ts";
import type { Slot } from "../ids.ts";
import type { GuestAddressing, GuestNetworkDriver, NetworkLease } from "./guest-network.ts";
import { foreignForwardDrops, HostNetwork } from "./host-network.ts";
import { GUEST, namespaceRules } from "./nft-rules.ts";
import { addressesOfGuest, namePrefix, slotAddresses, slotName, slotNetworks, slotOfName } from "./slots.ts";
import type { InstanceTag, SlotAddresses, SlotNetworks } from "./slots.ts";

const NETNS_DIR = "/run/netns";
const TAP = "tap0";

/** Sysctls of a namespace are seen only from within, so they go with the program that is there anyway. */
const LOAD_NAMESPACE = `
echo 1 > /proc/sys/net/ipv4/ip_forward &&
if [ -e /proc/sys/net/ipv6/conf/all/disable_ipv6 ]; then
  echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6 &&
  echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6
fi &&
exec nft -f -`;

export interface NetnsOptions {
  tag: InstanceTag;
  /** Where the host reaches guests, and where the pairs' ends lie: two free private networks of one size. */
  guestCidr?: string;
  linkCidr?: string;
  /** How many this agent may have; a power of two. */
  slots?: number;
  /** One or two IPv4 addresses, also private ones: guests reach their port 53. */
  resolvers: readonly string[];
  envdPort: number;
}

export class NetnsNetworks implements GuestNetworkDriver {
  readonly kind = "netns";
  readonly addressing: GuestAddressing = {
    addressCidr: `${GUEST.address}/${GUEST.prefixLength}`,
    gateway: GUEST.gateway,
    nameservers: GUEST.nameservers,
  };
  readonly #tag: InstanceTag;
  readonly #networks: SlotNetworks;
  readonly #resolvers: readonly string[];
  readonly #envdPort: number;
  readonly #host: HostNetwork;

  constructor(options: NetnsOptions) {
    const { tag, guestCidr = "10.11.0.0/16", linkCidr = "10.12.0.0/16", slots = 1024, resolvers } = options;
    if (resolvers.length === 0) throw new Error("guests need at least one resolver");
    this.#tag = tag;
    this.#networks = slotNetworks({ guestCidr, linkCidr, slots });
    this.#resolvers = resolvers;
    this.#envdPort = options.envdPort;
    this.#host = new HostNetwork({ tag, networks: this.#networks, resolvers });
  }

  async probe(signal: AbortSignal): Promise<{ ok: boolean; reason?: string }> {
    if (process.getuid?.() !== 0) return { ok: false, reason: "needs root, to make network namespaces" };
    const trial = `${namePrefix(this.#tag)}probe`;
    try {
      await access("/dev/net/tun", constants.R_OK | constants.W_OK);
      const noBlock = await this.#host.whyNoBlock(signal);
      if (noBlock !== undefined) return { ok: false, reason: noBlock };
      // The same commands, in a namespace that ends with the program.
      const addresses = slotAddresses(this.#networks, 0, 0);
      const pair = "link add eth0 type veth peer name peer0\nlink set peer0 up\n";
      const inside = pair + insideCommands({ addresses, uid: 0, mtu: 1280 });
      const rules = namespaceRules({ ...addresses, resolvers: this.#resolvers });
      await run(["unshare", "--net", "ip", "-batch", "-"], { input: inside, signal });
      await run(["unshare", "--net", "sh", "-c", LOAD_NAMESPACE], { input: rules, signal });
      await run(["ip", "-batch", "-"], { input: `netns add ${trial}\nnetns del ${trial}\n`, signal });
      const foreign = await foreignForwardDrops(signal);
      if (foreign.length === 0) return { ok: true };
      const rule = `iifname "${namePrefix(this.#tag)}*" and its counterpart`;
      return {
        ok: true,
        reason: `guests may have no way out: ${foreign.join(", ")} drops what it does not know; let it accept ${rule}`,
      };
    } catch (cause) {
      signal.throwIfAborted();
      return { ok: false, reason: whyNot(cause) };
    }
  }

  async prepareHost(signal: AbortSignal): Promise<void> {
    await this.#host.ensure(signal);
  }

  async restoreHost(signal: AbortSignal): Promise<void> {
    await this.#host.restore(signal);
  }

  plan(slot: Slot, uid: number): NetworkLease {
    const { claim } = this.#host;
    if (claim === undefined) throw new Error("prepareHost comes before the first plan");
    const { guest } = slotAddresses(this.#networks, claim.block, slot);
    const netnsPath = `${NETNS_DIR}/${slotName(this.#tag, slot)}`;
    const nic = { kind: "tap" as const, netnsPath, tapName: TAP, mac: GUEST.mac };
    return { driver: this.kind, slot, uid, nic, envdHost: guest, envdPort: this.#envdPort };
  }

  async up(lease: NetworkLease, signal: AbortSignal): Promise<void> {
    const name = this.#nameOf(lease);
    const { mtu } = await this.#host.ensure(signal);
    if ((await readAlias(name)) === aliasOf(lease)) return;
    await this.down(lease, signal);
    const addresses = addressesOfGuest(this.#networks, lease.envdHost);
    await run(["ip", "-batch", "-"], { input: hostCommands({ name, addresses, mtu }), signal });
    await turnIpv6Off(name);
    const rules = namespaceRules({ ...addresses, resolvers: this.#resolvers });
    const inside = insideCommands({ addresses, uid: lease.uid, mtu });
    // Both end before either's failure is told: nothing of `up` runs on when it has failed.
    const results = await Promise.allSettled([
      run(["ip", "-n", name, "-batch", "-"], { input: inside, signal }),
      run(["nsenter", `--net=${NETNS_DIR}/${name}`, "sh", "-c", LOAD_NAMESPACE], { input: rules, signal }),
    ]);
    for (const result of results) if (result.status === "rejected") throw result.reason;
    await writeFile(`/sys/class/net/${name}/ifalias`, aliasOf(lease));
  }

  async down(lease: NetworkLease, signal: AbortSignal): Promise<void> {
    this.#nameOf(lease); // or it is not ours
    await this.downSlot(lease.slot, signal);
  }

  async downSlot(slot: Slot, signal: AbortSignal): Promise<void> {
    const name = slotName(this.#tag, slot);
    const [hasLink, hasNamespace] = await Promise.all([
      exists(`/sys/class/net/${name}`),
      exists(`${NETNS_DIR}/${name}`),
    ]);
    // The link first: without it nothing of the namespace is reached, even if a process keeps that.
    const commands = [
      ...(hasLink ? [`link del ${name}`] : []),
      ...(hasNamespace ? [`netns del ${name}`] : []),
    ];
    if (commands.length > 0) await run(["ip", "-batch", "-"], { input: `${commands.join("\n")}\n`, signal });
  }

  async listOwnedSlots(signal: AbortSignal): Promise<Slot[]> {
    const names = (await Promise.all([list(NETNS_DIR), list("/sys/class/net")])).flat();
    signal.throwIfAborted();
    const slots = names.map((name) => slotOfName(this.#tag, name)).filter((slot) => slot !== undefined);
    return [...new Set(slots)].sort((a, b) => a - b);
  }

  #nameOf(lease: NetworkLease): string {
    const name = slotName(this.#tag, lease.slot);
    if (lease.nic.kind !== "tap" || lease.nic.netnsPath !== `${NETNS_DIR}/${name}`) {
      throw new Error(`the lease of slot ${lease.slot} is not of this agent's namespaces`);
    }
    return name;
  }
}

interface Half {
  addresses: SlotAddresses;
  mtu: number;
}

function hostCommands({
  name,
  addresses: { guest, hostLink, namespaceLink },
  mtu,
}: Half & { name: string }): string {
  return `netns add ${name}
link add ${name} mtu ${mtu} type veth peer name eth0 mtu ${mtu} netns ${name}
link set ${name} addrgenmode none
addr add ${hostLink}/31 dev ${name}
link set ${name} up
route add ${guest}/32 via ${namespaceLink} dev ${name} src ${hostLink} onlink
`;
}

function insideCommands({
  addresses: { hostLink, namespaceLink },
  uid,
  mtu,
}: Half & { uid: number }): string {
  return `link set lo up
link set eth0 addrgenmode none
addr add ${namespaceLink}/31 dev eth0
link set eth0 up
route add default via ${hostLink}
tuntap add dev ${TAP} mode tap user ${uid}
link set ${TAP} address ${GUEST.gatewayMac} mtu ${mtu} addrgenmode none
addr add ${GUEST.gateway}/${GUEST.prefixLength} dev ${TAP}
link set ${TAP} up
neigh add ${GUEST.address} lladdr ${GUEST.mac} dev ${TAP} nud permanent
`;
}

async function turnIpv6Off(device: string): Promise<void> {
  const path = `/proc/sys/net/ipv6/conf/${device}/disable_ipv6`;
  if (await exists(path)) await writeFile(path, "1");
}

const aliasOf = (lease: NetworkLease): string => `rookery ${lease.envdHost} uid ${lease.uid}`;

async function readAlias(name: string): Promise<string | undefined> {
  try {
    return (await readFile(`/sys/class/net/${name}/ifalias`, "utf8")).trim();
  } catch (cause) {
    if (isErrno(cause, "ENOENT")) return undefined;
    throw cause;
  }
}

async function list(directory: string): Promise<string[]> {
  try {
    return await readdir(directory);
  } catch (cause) {
    if (isErrno(cause, "ENOENT")) return [];
    throw cause;
  }
}

async function exists(path: string): Promise<boolean> {
  try {
    await access(path);
    return true;
  } catch (cause) {
    if (isErrno(cause, "ENOENT")) return false;
    throw cause;
  }
}

/** Words a person can act on. */
function whyNot(cause: unknown): string {
  if (isErrno(cause, "ENOENT", "EACCES", "EPERM"))
    return "/dev/net/tun is missing or closed: load the module tun";
  if (cause instanceof CommandError && isErrno(cause.cause, "ENOENT")) {
    return `the program ${cause.argv[0]} is missing: install iproute2, nftables and util-linux`;
  }
  const message = cause instanceof Error ? cause.message : String(cause);
  return `this kernel or container does not let us make guest networks: ${message}`;
}
