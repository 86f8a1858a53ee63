/**
 * Makes this clone differ from every other: clock, entropy, names; and its
 * root file system as large as its disk.
 *
 * It is on the critical path of each create and runs on code that the host's
 * emulator has not translated yet. So it is all in process and synchronous,
 * without a thread, a child or a shell.
 */
import { closeSync, openSync, readFileSync, statSync, statfsSync, writeFileSync } from "node:fs";
import { messageOf } from "../errors.ts";
import type { Native } from "../system/native.ts";
import type { Users } from "../system/users.ts";
import { parseTimestamp } from "./init-request.ts";
import type { InitRequest } from "./init-request.ts";

/** A clock that is right to this much is left alone: no timer of a user fires twice for it. */
const CLOCK_TOLERANCE_MS = 20;

export class InitStepError extends Error {
  override readonly name = "InitStepError";
}

export interface InitDeps {
  native: Native;
  users: Users;
}

interface Step {
  name: string;
  run(init: InitRequest, deps: InitDeps): void;
}

const STEPS: readonly Step[] = [
  { name: "entropy", run: (init, { native }) => addEntropy(Buffer.from(init.entropy, "base64"), native) },
  { name: "clock", run: (init, { native }) => setClock(init.timestamp, native) },
  { name: "hostname", run: (init) => setHostname(init.hostname) },
  { name: "machine id", run: (init) => writeFileSync("/etc/machine-id", `${init.machineId}\n`) },
  { name: "default user", run: (init, { users }) => checkUser(init.defaultUser, users) },
  {
    name: "root file system",
    run: (init, { native }) => {
      if (init.growRootFs) growFileSystem("/", native);
    },
  },
];

/** Throws an InitStepError that names the step. May be run again: each step bears it. */
export function applyInit(init: InitRequest, deps: InitDeps): void {
  for (const step of STEPS) {
    try {
      step.run(init, deps);
    } catch (cause) {
      throw new InitStepError(`init failed at ${step.name}: ${messageOf(cause)}`, { cause });
    }
  }
}

export function addEntropy(entropy: Uint8Array, native: Native): void {
  const urandom = openSync("/dev/urandom", "w");
  try {
    native.addEntropy(urandom, entropy);
  } finally {
    closeSync(urandom);
  }
}

function setClock(timestamp: string, native: Native): void {
  const time = parseTimestamp(timestamp);
  const wantedMs = Number(time.seconds) * 1000 + Number(time.nanoseconds) / 1e6;
  if (Math.abs(Date.now() - wantedMs) > CLOCK_TOLERANCE_MS) native.setClock(time);
}

function setHostname(hostname: string): void {
  if (readFileSync("/proc/sys/kernel/hostname", "utf8").trimEnd() === hostname) return;
  writeFileSync("/proc/sys/kernel/hostname", hostname);
  writeFileSync("/etc/hostname", `${hostname}\n`);
  // sudo looks its own host up and complains when it is unknown.
  const hosts = readFileSync("/etc/hosts", "utf8");
  writeFileSync("/etc/hosts", withOwnName(hosts, hostname));
}

/** 127.0.1.1 is Debian's line for a host's own name (hosts(5)); the rest is the user's. */
export function withOwnName(hosts: string, hostname: string): string {
  const others = hosts.split("\n").filter((line) => line !== "" && !/^127\.0\.1\.1\s/.test(line));
  return [...others, `127.0.1.1 ${hostname}`, ""].join("\n");
}

function checkUser(name: string, users: Users): void {
  if (users.find(name) === undefined) throw new Error(`there is no user '${name}'`);
}

/**
 * Grows the mounted ext4 at `mountPoint` to its block device: what resize2fs
 * does for a mounted file system is this one call, but it would be a process.
 */
export function growFileSystem(mountPoint: string, native: Native): void {
  const device = statSync(mountPoint).dev;
  // linux/kdev_t.h: 12 bits of major between 8 + 12 bits of minor.
  const minor = (device & 0xff) | ((device >>> 12) & 0xfff00);
  const major = (device >>> 8) & 0xfff;
  const sectors = readFileSync(`/sys/dev/block/${major}:${minor}/size`, "utf8").trim();
  const { bsize } = statfsSync(mountPoint);
  const fd = openSync(mountPoint, "r");
  try {
    native.growExt4(fd, (BigInt(sectors) * 512n) / BigInt(bsize));
  } finally {
    closeSync(fd);
  }
}
