/**
 * What the agent's core asks of the real host.
 */
import { readdir, readFile, readlink, realpath, statfs } from "node:fs/promises";
import { setTimeout as delay } from "node:timers/promises";
import { isErrno } from "../host/errno.ts";
import { signalProcess, waitUntilGone, type ProcessIdentity } from "../host/process.ts";
import type { HostFacts } from "../sandbox-manager/deps.ts";

const KILL_TIMEOUT_MS = 10_000;
const KILL_POLL_MS = 5;

export async function openHostFacts(): Promise<HostFacts> {
  const bootId = (await readFile("/proc/sys/kernel/random/boot_id", "utf8")).trim();
  return { bootId, freeDiskBytes, killProcess, killProcessesOf, killProcessesIn };
}

async function freeDiskBytes(path: string): Promise<number> {
  const { bavail, bsize } = await statfs(path);
  return bavail * bsize;
}

async function killProcess(identity: ProcessIdentity): Promise<undefined> {
  await signalProcess(identity, "SIGKILL");
  if (await waitUntilGone(identity, { timeoutMs: KILL_TIMEOUT_MS })) return;
  throw new Error(`process ${identity.pid} does not end`);
}

async function killProcessesOf(uid: number): Promise<void> {
  if (uid === 0) throw new Error("refusing to end the processes of root");
  await killAll(`of uid ${uid}`, async (pid) => {
    const status = await readFile(`/proc/${pid}/status`, "utf8");
    const real = /^Uid:\s+(\d+)/m.exec(status)?.[1];
    // A zombie holds nothing, and only its parent can end it.
    return Number(real) === uid && !/^State:\s+Z/m.test(status);
  });
}

async function killProcessesIn(directory: string): Promise<void> {
  let path: string;
  try {
    path = await realpath(directory);
  } catch (cause) {
    if (isErrno(cause, "ENOENT")) return;
    throw cause;
  }
  await killAll(`in ${directory}`, async (pid) => (await readlink(`/proc/${pid}/cwd`)) === path);
}

/** Waits until they are gone: what they hold (a TAP, a disk) is busy until then. */
async function killAll(which: string, isMeant: (pid: number) => Promise<boolean>): Promise<void> {
  const deadline = Date.now() + KILL_TIMEOUT_MS;
  for (;;) {
    const pids = await processesThat(isMeant);
    if (pids.length === 0) return;
    if (Date.now() > deadline) throw new Error(`processes ${pids.join(", ")} ${which} do not end`);
    for (const pid of pids) {
      try {
        process.kill(pid, "SIGKILL");
      } catch (cause) {
        if (!isErrno(cause, "ESRCH")) throw cause;
      }
    }
    await delay(KILL_POLL_MS);
  }
}

async function processesThat(isMeant: (pid: number) => Promise<boolean>): Promise<number[]> {
  const found: number[] = [];
  for (const name of await readdir("/proc")) {
    if (!/^\d+$/.test(name)) continue;
    try {
      if (await isMeant(Number(name))) found.push(Number(name));
    } catch (cause) {
      // Gone meanwhile, or another user's, whose VMMs are not ours.
      if (!isErrno(cause, "ENOENT", "ESRCH", "EACCES", "EPERM")) throw cause;
    }
  }
  return found;
}
