import { isIPv4 } from "node:net";

/** Is this an IP address that only this machine can reach? Names are not: what they stand for may change. */
export function isLoopback(host: string): boolean {
  return host === "::1" || (isIPv4(host) && host.startsWith("127."));
}
