/**
 * Starts a VMM's process, confined.
 *
 * As root: its own session, cgroups, network namespace, mount, IPC and UTS
 * namespace, a root file system that holds /usr (read-only), its run directory
 * at /vm, a /proc without other processes, and three device nodes; its own uid
 * without capabilities or the means to regain any. A chain of execs, so the pid
 * that we spawn is the VMM's own, and what a link of the chain has to say about
 * its failure stands in the VMM's log.
 *
 * Not as root, there is no confinement but QEMU's own system call filter.
 *
 * The command line names nothing of other sandboxes, nor does the environment.
 */
import { spawn, type ChildProcess } from "node:child_process";
import { closeSync, openSync } from "node:fs";
import { access, lstat } from "node:fs/promises";
import { join } from "node:path";
import { identifyChild, type ProcessIdentity } from "../../host/process.ts";
import type { VmPlace } from "../vmm.ts";

/** Where a confined VMM sees its run directory. */
const JAILED_RUN_DIR = "/vm";

/** Enters cgroups, then the rest. $1: how many `cgroup.procs` files follow. */
const JOIN = `
set -eu
umask 077
ulimit -c 0
count=$1; shift
while [ "$count" -gt 0 ]; do
  echo $$ > "$1"; shift; count=$((count - 1))
done
exec "$@"
`;

/**
 * Builds the private root and moves into it. $1 mount point (any directory of
 * ours: only this namespace sees it covered), $2 run directory, $3 uid, $4 "kvm"
 * or "". One mount(8) for all bind mounts: starting programs is what costs here.
 */
const CONFINE = `
set -eu
root=$1 run=$2 uid=$3 kvm=$4; shift 4
mount -t tmpfs -o size=256k,nr_inodes=64,mode=0755,nosuid,noexec rookery "$root"
cd "$root"
umask 022
mkdir usr proc vm dev dev/net etc old
mknod -m 666 dev/null c 1 3
mknod -m 666 dev/net/tun c 10 200
[ -z "$kvm" ] || mknod -m 666 dev/kvm c 10 232
for name in lib lib64; do
  if [ -L "/$name" ]; then ln -s "usr/$name" "$name"
  elif [ -d "/$name" ]; then mkdir "$name"; echo "/$name $root/$name none bind,ro,nosuid 0 0" >> etc/fstab
  fi
done
cat >> etc/fstab <<END
/usr $root/usr none bind,ro,nosuid 0 0
rookery $root/proc proc hidepid=invisible,subset=pid,nosuid,nodev,noexec 0 0
$run $root/vm none bind,nosuid,noexec 0 0
END
mount -a -T etc/fstab
[ ! -e /etc/ld.so.cache ] || cat /etc/ld.so.cache > etc/ld.so.cache
rm etc/fstab
mount -o remount,ro "$root"
pivot_root . old
cd /vm
umount -l /old
exec setpriv --reuid "$uid" --regid "$uid" --clear-groups --no-new-privs \\
  --inh-caps=-all --ambient-caps=-all --bounding-set=-all -- "$@"
`;

export interface LaunchOptions {
  place: VmPlace;
  /** A path below /usr when confined. */
  program: string;
  programArguments: readonly string[];
  /** Descriptors of ours that the VMM gets, as 3, 4, …; they stay ours to close. */
  descriptors: readonly number[];
  needsKvm: boolean;
  logFile: string;
}

export interface Launched {
  identity: ProcessIdentity;
  child: ChildProcess;
}

export function isConfined(place: VmPlace): boolean {
  return place.uid !== 0;
}

/** The run directory as the VMM names it. */
export function runDirAsSeen(place: VmPlace): string {
  return isConfined(place) ? JAILED_RUN_DIR : place.runDir;
}

/** mount(8) reads these as fields of a table; none of ours has such a character. */
function checkTablePath(path: string): void {
  if (!/^\/[A-Za-z0-9._/@+-]*$/.test(path))
    throw new Error(`a VMM's directory has an unsupported name: ${path}`);
}

export async function launch(options: LaunchOptions): Promise<Launched> {
  const { place } = options;
  const asRoot = process.getuid?.() === 0;
  if (asRoot !== isConfined(place)) {
    throw new Error(
      asRoot ? "root must give a VMM a uid of its own" : "only root can give a VMM another uid",
    );
  }
  const argv = [
    "/bin/sh",
    "-c",
    JOIN,
    "rookery-vmm",
    `${place.cgroupProcs.length}`,
    ...place.cgroupProcs,
    ...(asRoot ? await confinement(options) : []),
    options.program,
    ...options.programArguments,
  ] as const;

  // Appending: the agent may cut the file short while the VMM writes on.
  const log = openSync(options.logFile, "a", 0o600);
  try {
    const [program, ...rest] = argv;
    const child = spawn(program, rest, {
      cwd: place.runDir,
      detached: true,
      // One arena: the threads of a VMM hardly allocate, and each arena of its own costs some MB.
      env: { PATH: "/usr/sbin:/usr/bin:/sbin:/bin", LC_ALL: "C", MALLOC_ARENA_MAX: "1" },
      stdio: ["ignore", log, log, ...options.descriptors],
    });
    const { pid } = child;
    if (pid === undefined) {
      const cause = await new Promise<Error>((resolve) => child.once("error", resolve));
      throw new Error("the VMM's launcher could not be started", { cause });
    }
    child.unref();
    return { identity: identifyChild(pid), child };
  } finally {
    closeSync(log);
  }
}

async function confinement(options: LaunchOptions): Promise<string[]> {
  const { place, program, needsKvm } = options;
  if (!program.startsWith("/usr/")) throw new Error(`a confined VMM must lie below /usr: ${program}`);
  checkTablePath(place.runDir);
  checkTablePath(place.socketDir);
  // Fail here with a name instead of later inside of the chain.
  await access(place.runDir);
  if (!(await lstat(place.socketDir)).isDirectory()) throw new Error("the socket directory is none");
  const netns = place.nic.kind === "tap" ? ["nsenter", `--net=${place.nic.netnsPath}`, "--"] : [];
  return [
    ...netns,
    ...["unshare", "--mount", "--ipc", "--uts", "--"],
    ...["/bin/sh", "-c", CONFINE, "rookery-vmm", place.socketDir, place.runDir, `${place.uid}`],
    needsKvm ? "kvm" : "",
  ];
}

export function logFileOf(place: VmPlace): string {
  return join(place.logDir, "vmm.log");
}
