/**
 * Where a run with real processes lives: namespaces of its own for processes,
 * mounts and the network, all below one process.
 *
 * So nothing has to be swept, whatever ends a run, a SIGKILL too: when the first
 * process of the enclosure is gone, the kernel ends all others, and with the
 * last of them go the mounts (where all files of the run lie), the network
 * namespaces, their links, addresses and filters. Nothing of it is ever in the
 * machine's own namespaces.
 */
import { execFileSync, spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync, readdirSync } from "node:fs";
import { sep } from "node:path";

const INSIDE = "ROOKERY_FAULTS_ENCLOSURE";
/** Directories that every Linux has, and few use; one is covered, within the enclosure alone. */
const ROOTS = ["/srv", "/media", "/opt", "/mnt"];
const SIZE = "4g";

/** The run's directory; undefined outside of an enclosure. */
export function enclosureRoot(): string | undefined {
  return process.env[INSIDE];
}

/** Runs this very program with the same arguments inside; returns its exit code. */
export async function runEnclosed(): Promise<number> {
  if (process.getuid?.() !== 0) throw new Error("real processes need root: namespaces, packet filters");
  const { argv, execPath } = process;
  const own = [execPath, ...process.execArgv, ...argv.slice(1)];
  // The first process takes in those whose parents are gone; a shell does that, Node does not.
  const init = ["sh", "-c", '"$@"; exit $?', "sh", ...own];
  const namespaces = ["--net", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"];
  const child = spawn("setpriv", ["--pdeathsig", "KILL", "unshare", ...namespaces, ...init], {
    env: { ...process.env, [INSIDE]: chooseRoot() },
    stdio: "inherit",
  });
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) {
    process.once(signal, () => child.kill("SIGKILL"));
  }
  const [code] = (await once(child, "exit")) as [number | null];
  return code ?? 1;
}

/** Inside: an empty file system for the run's files, and a network that forwards. */
export function furnish(root: string): void {
  run("mount", "-t", "tmpfs", "-o", `mode=755,size=${SIZE}`, "rookery-faults", root);
  run("ip", "link", "set", "lo", "up");
  run("sysctl", "-q", "-w", "net.ipv4.ip_forward=1");
}

export function run(program: string, ...args: string[]): void {
  execFileSync(program, args, { stdio: ["ignore", "ignore", "inherit"] });
}

function chooseRoot(): string {
  const found = ROOTS.find(
    (dir) =>
      existsSync(dir) && readdirSync(dir).length === 0 && !import.meta.dirname.startsWith(`${dir}${sep}`),
  );
  if (found === undefined) throw new Error(`none of ${ROOTS.join(", ")} is there and empty`);
  return found;
}
