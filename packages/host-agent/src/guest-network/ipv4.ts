/** IPv4 addresses as numbers, and blocks of them. */

export interface Ipv4Block {
  /** First address, as an unsigned 32-bit number. */
  first: number;
  /** A power of two. */
  size: number;
}

export function parseIpv4(text: string): number {
  const parts = /^(\d{1,3})\.(\d{1,3})\.(\d{1,3})\.(\d{1,3})$/.exec(text)?.slice(1).map(Number);
  if (parts === undefined || parts.some((part) => part > 255))
    throw new Error(`not an IPv4 address: ${text}`);
  return parts.reduce((value, part) => value * 256 + part, 0);
}

export function formatIpv4(address: number): string {
  return [24, 16, 8, 0].map((shift) => (address >>> shift) & 255).join(".");
}

/** `10.12.0.0/16`, or one address. Bits below the prefix must be zero. */
export function parseIpv4Block(text: string): Ipv4Block {
  const [address = "", prefix = "32"] = text.split("/");
  const length = /^\d{1,2}$/.test(prefix) ? Number(prefix) : 33;
  if (length > 32) throw new Error(`not an IPv4 block: ${text}`);
  const block = { first: parseIpv4(address), size: 2 ** (32 - length) };
  if (block.first % block.size !== 0) throw new Error(`${text}: does not begin at a multiple of its size`);
  return block;
}

export function formatIpv4Block({ first, size }: Ipv4Block): string {
  return `${formatIpv4(first)}/${32 - Math.log2(size)}`;
}

export function overlaps(one: Ipv4Block, other: Ipv4Block): boolean {
  return one.first < other.first + other.size && other.first < one.first + one.size;
}

/**
 * What is not the public Internet: IANA's special-purpose registry (RFC 6890)
 * with multicast and what lies above it. Guests get none of it.
 */
export const NOT_PUBLIC: readonly string[] = [
  "0.0.0.0/8",
  "10.0.0.0/8",
  "100.64.0.0/10",
  "127.0.0.0/8",
  "169.254.0.0/16",
  "172.16.0.0/12",
  "192.0.0.0/24",
  "192.0.2.0/24",
  "192.88.99.0/24",
  "192.168.0.0/16",
  "198.18.0.0/15",
  "198.51.100.0/24",
  "203.0.113.0/24",
  "224.0.0.0/3",
];

const NOT_PUBLIC_BLOCKS = NOT_PUBLIC.map(parseIpv4Block);

export function isPublic(address: number): boolean {
  return NOT_PUBLIC_BLOCKS.every((block) => !overlaps(block, { first: address, size: 1 }));
}
