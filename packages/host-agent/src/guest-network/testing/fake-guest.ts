/** Namespaces that stand in for a guest behind its TAP, and for hosts out there. */
import { spawn } from "node:child_process";
import { once } from "node:events";
import { fileURLToPath } from "node:url";
import { run } from "../../host/run.ts";
import type { NetworkLease } from "../guest-network.ts";
import { GUEST } from "../nft-rules.ts";

const PROBE = fileURLToPath(new URL("guest-probe.ts", import.meta.url));

/** A namespace of a test's own, with a probe in it. */
export interface Standin extends AsyncDisposable {
  name: string;
  /** Runs a program in it. */
  exec(...argv: [string, ...string[]]): Promise<string>;
}

export async function batch(commands: string, ...where: string[]): Promise<void> {
  await run(["ip", ...where, "-batch", "-"], { input: commands });
}

/** In `name` (made by the caller), until disposed of; the namespace goes with it. `args` as guest-probe.ts has them. */
export async function startProbe(name: string, ...args: string[]): Promise<Standin> {
  const child = spawn("ip", ["netns", "exec", name, process.execPath, PROBE, ...args], {
    stdio: ["ignore", "pipe", "inherit"],
  });
  const ended = once(child, "exit");
  await Promise.race([
    once(child.stdout, "data"),
    ended.then(() => Promise.reject(new Error("the probe died"))),
  ]);
  return {
    name,
    exec: async (...argv) => (await run(["ip", "netns", "exec", name, ...argv])).stdout,
    async [Symbol.asyncDispose]() {
      child.kill("SIGKILL");
      await ended;
      await run(["ip", "netns", "del", name]);
    },
  };
}

/** Takes the TAP's place: what the guest sends comes out of an interface with the TAP's name. */
export async function placeGuest(lease: NetworkLease): Promise<Standin> {
  if (lease.nic.kind !== "tap") throw new Error("only a namespace has a TAP");
  const slot = lease.nic.netnsPath.split("/").at(-1) ?? "";
  const guest = `${slot}g`;
  await batch(`netns add ${guest}\n`);
  await batch(
    `link del tap0
link add tap0 address ${GUEST.gatewayMac} type veth peer name eth0 address ${GUEST.mac} netns ${guest}
addr add ${GUEST.gateway}/${GUEST.prefixLength} dev tap0
link set tap0 up
neigh add ${GUEST.address} lladdr ${GUEST.mac} dev tap0 nud permanent
`,
    "-n",
    slot,
  );
  await batch(
    `link set lo up
addr add ${GUEST.address}/${GUEST.prefixLength} dev eth0
link set eth0 up
route add default via ${GUEST.gateway}
`,
    "-n",
    guest,
  );
  return startProbe(guest, `${lease.envdPort}`);
}

/** The world beyond the host's uplink: it has all of `addresses`, and the host routes to them there. */
export async function placeInternet(name: string, addresses: readonly string[]): Promise<Standin> {
  await batch(`netns add ${name}
link add ${name} type veth peer name eth0 netns ${name}
addr add 198.51.100.1/30 dev ${name}
link set ${name} up
${addresses.map((address) => `route add ${address}/32 via 198.51.100.2 dev ${name} src 198.51.100.1`).join("\n")}
`);
  await batch(
    `link set lo up
addr add 198.51.100.2/30 dev eth0
link set eth0 up
route add default via 198.51.100.1
${addresses.map((address) => `addr add ${address}/32 dev eth0`).join("\n")}
`,
    "-n",
    name,
  );
  return startProbe(name, "80", ...addresses);
}
