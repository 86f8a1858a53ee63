/**
 * Whom guests ask for names. A guest always asks the same two addresses, which
 * its namespace translates: so warm images do not depend on where a host is.
 *
 * Without configuration a guest gets the host's own resolvers when they are
 * public ones, since a private one would tell it the names of the network that
 * it must not reach.
 */
import { readFile } from "node:fs/promises";
import { isErrno } from "../host/errno.ts";
import { isPublic, parseIpv4 } from "./ipv4.ts";

/** Second: what systemd-resolved, when it is the first's only server, asks itself. */
const RESOLV_CONF = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"];
const FALLBACK: readonly string[] = ["1.1.1.1", "8.8.8.8"];

export async function hostResolvers(): Promise<readonly string[]> {
  for (const path of RESOLV_CONF) {
    const text = await readFile(path, "utf8").catch((cause: unknown) => {
      if (isErrno(cause, "ENOENT")) return "";
      throw cause;
    });
    const found = publicNameservers(text);
    if (found.length > 0) return found;
  }
  return FALLBACK;
}

/** The first two public IPv4 nameservers of a resolv.conf(5). */
export function publicNameservers(resolvConf: string): string[] {
  return [...resolvConf.matchAll(/^nameserver[ \t]+(\d+\.\d+\.\d+\.\d+)[ \t]*$/gm)]
    .map((match) => match[1] ?? "")
    .filter((address) => isAddress(address) && isPublic(parseIpv4(address)))
    .slice(0, 2);
}

function isAddress(text: string): boolean {
  try {
    parseIpv4(text);
    return true;
  } catch {
    return false; // 999.1.1.1: the host's resolver passes over it too
  }
}
