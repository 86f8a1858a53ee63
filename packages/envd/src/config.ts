/**
 * What envd is told from outside: once, at its start, by its environment.
 *
 *   ROOKERY_ENVD_PORT      port to listen on; 0 lets the kernel choose (tests)
 *   ROOKERY_ENVD_ADDRESS   address to listen on
 *   ROOKERY_HOST_ADDRESS   comma-separated addresses that POST /init is taken
 *                          from; `rookery.host_address=` of the kernel's
 *                          command line counts where this is absent
 *   ROOKERY_ENVD_DEBUG     "1": says on stderr what it does
 */
import { readFileSync } from "node:fs";
import { isIPv4 } from "node:net";

/** E2B's port of envd: its clients ask for it by number. */
const DEFAULT_PORT = 49_983;
/**
 * The guest's gateway, which is the host: the TAP's address in `netns` mode,
 * and the address that QEMU's user-mode network gives to itself.
 */
const DEFAULT_HOST_ADDRESSES = ["169.254.0.22", "10.0.2.2"];
const DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

export interface Config {
  readonly port: number;
  readonly address: string;
  readonly hostAddresses: ReadonlySet<string>;
  readonly debug: boolean;
  /** PATH of every user process that names none. */
  readonly path: string;
}

export function readConfig(
  env: NodeJS.ProcessEnv,
  kernelCommandLine: () => string = () => readFileSync("/proc/cmdline", "utf8"),
): Config {
  const port = env["ROOKERY_ENVD_PORT"] === undefined ? DEFAULT_PORT : Number(env["ROOKERY_ENVD_PORT"]);
  if (!Number.isInteger(port) || port < 0 || port > 65_535) {
    throw new Error(`ROOKERY_ENVD_PORT is no port: ${env["ROOKERY_ENVD_PORT"]}`);
  }
  const named =
    env["ROOKERY_HOST_ADDRESS"] || /(?:^|\s)rookery\.host_address=(\S+)/.exec(kernelCommandLine())?.[1];
  const hostAddresses = named === undefined ? DEFAULT_HOST_ADDRESSES : named.split(",");
  for (const address of hostAddresses) {
    if (!isIPv4(address)) throw new Error(`ROOKERY_HOST_ADDRESS holds no IPv4 address: ${address}`);
  }
  return Object.freeze({
    port,
    address: env["ROOKERY_ENVD_ADDRESS"] ?? "0.0.0.0",
    hostAddresses: new Set(hostAddresses),
    debug: env["ROOKERY_ENVD_DEBUG"] === "1",
    path: env["PATH"] ?? DEFAULT_PATH,
  });
}
