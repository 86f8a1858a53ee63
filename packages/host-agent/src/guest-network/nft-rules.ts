/**
 * The packet filter's rules, as nft(8) reads them.
 *
 * Two tables guard each guest: its namespace's own, which nobody's firewall
 * reload touches, and one in the host's namespace, which also binds a VMM that
 * was broken into and speaks as the namespace itself. Both say in the end: out
 * to the public Internet and nothing else, in only from this host.
 */
import { formatIpv4Block, NOT_PUBLIC } from "./ipv4.ts";
import type { Ipv4Block } from "./ipv4.ts";
import type { SlotAddresses } from "./slots.ts";

export const GUEST = {
  address: "169.254.0.21",
  gateway: "169.254.0.22",
  prefixLength: 30,
  /** Translated to the resolvers of the day. */
  nameservers: ["169.254.0.53", "169.254.0.54"],
  /** Equal in all namespaces: a clone remembers its gateway's and is remembered by its own. */
  mac: "02:72:6b:00:00:01",
  gatewayMac: "02:72:6b:00:00:fe",
} as const;

/** Of connections at a time and of new ones a second: the host's table of them is one for all. */
const MAX_CONNECTIONS = 4096;
const MAX_NEW_PER_SECOND = 500;

export interface Resolvers {
  resolvers: readonly string[];
}

export function namespaceRules({ guest, namespaceLink, resolvers }: SlotAddresses & Resolvers): string {
  const dns = GUEST.nameservers.map(
    (nameserver, index) =>
      `iifname "tap0" ip daddr ${nameserver} meta l4proto { tcp, udp } th dport 53 dnat ip to ${resolvers[index % resolvers.length]}`,
  );
  return `table inet guest
delete table inet guest
table inet guest {
  set not_public { type ipv4_addr; flags interval; elements = { ${NOT_PUBLIC.join(", ")} } }
  chain only_its_own_address {
    type filter hook prerouting priority raw; policy accept;
    iifname "tap0" meta nfproto != ipv4 drop
    iifname "tap0" ip saddr != ${GUEST.address} drop
  }
  chain inwards {
    type nat hook prerouting priority dstnat; policy accept;
    iifname "eth0" ip daddr ${guest} dnat ip to ${GUEST.address}
    ${dns.join("\n    ")}
  }
  chain outwards {
    type nat hook postrouting priority srcnat; policy accept;
    oifname "eth0" snat ip to ${namespaceLink}
    oifname "tap0" snat ip to ${GUEST.gateway}
  }
  chain input {
    type filter hook input priority filter; policy drop;
    ct state established,related accept
  }
  chain output {
    type filter hook output priority filter; policy drop;
    ct state established,related accept
  }
  chain forward {
    type filter hook forward priority filter; policy drop;
    tcp flags syn tcp option maxseg size set rt mtu
    ct state established,related accept
    iifname "eth0" oifname "tap0" ct status dnat accept
    iifname "tap0" oifname "eth0" jump from_guest
  }
  chain from_guest {
    ct state != new drop
    limit rate over ${MAX_NEW_PER_SECOND}/second burst ${MAX_NEW_PER_SECOND * 2} packets drop
    ct count over ${MAX_CONNECTIONS} drop
    ct status dnat accept
    ip daddr != @not_public accept
  }
}
`;
}

export interface HostTable extends Resolvers {
  table: string;
  /** What our devices' names begin with. */
  prefix: string;
  /** Addresses of the namespaces' ends of this agent's links. */
  links: Ipv4Block;
}

/** Replaces the table as a whole: no packet passes between the old rules and the new. */
export function hostRules({ table, prefix, links, resolvers }: HostTable): string {
  return `table inet ${table}
delete table inet ${table}
table inet ${table} {
  set not_public { type ipv4_addr; flags interval; elements = { ${NOT_PUBLIC.join(", ")} } }
  set resolvers { type ipv4_addr; elements = { ${[...new Set(resolvers)].join(", ")} } }
  chain input {
    type filter hook input priority filter - 10; policy accept;
    iifname "${prefix}*" ct state established,related accept
    iifname "${prefix}*" drop
  }
  chain forward {
    type filter hook forward priority filter - 10; policy accept;
    iifname "${prefix}*" jump from_guests
    oifname "${prefix}*" ct state established,related accept
    oifname "${prefix}*" drop
  }
  chain from_guests {
    oifname "rk*" drop
    ip saddr != ${formatIpv4Block(links)} drop
    meta nfproto != ipv4 drop
    ct state established,related accept
    ip daddr @resolvers meta l4proto { tcp, udp } th dport 53 accept
    ip daddr @not_public drop
    accept
  }
  chain outwards {
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr ${formatIpv4Block(links)} oifname != "${prefix}*" masquerade
  }
}
`;
}
