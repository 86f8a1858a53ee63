/**
 * One agent per data directory: a file lock that the kernel takes back when its
 * holder dies, however it dies. The file names the holder, for those who must
 * end it first.
 */
import { mkdir, open, readFile } from "node:fs/promises";
import type { FileHandle } from "node:fs/promises";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { RookeryError } from "@rookery/protocol/errors";
import { z } from "zod";
import { tryLockFile } from "./ffi.ts";
import { identifyProcess, isAlive, signalProcess } from "./process.ts";
import type { ProcessIdentity } from "./process.ts";

const POLL_MS = 20;

const holderSchema = z.object({ pid: z.int().positive(), startTime: z.string() });

export class DataLock implements AsyncDisposable {
  readonly #file: FileHandle;

  private constructor(file: FileHandle) {
    this.#file = file;
  }

  /** Throws `wrong_state` when another process has it. */
  static async acquire(dataDir: string): Promise<DataLock> {
    const lock = await DataLock.#tryAcquire(dataDir);
    if (lock !== undefined) return lock;
    const holder = await readHolder(dataDir);
    const who = holder === undefined ? "another process" : `process ${holder.pid}`;
    throw new RookeryError("wrong_state", `${dataDir} is in use by ${who}: one agent per data directory`);
  }

  /** Ends the agent that has the lock, if there is one: SIGTERM, and SIGKILL when `graceMs` have passed. */
  static async seize(dataDir: string, graceMs: number): Promise<DataLock> {
    const begunAt = performance.now();
    // The lock outlives the process's main thread by as long as its other threads take to end.
    const giveUpAt = begunAt + 2 * graceMs;
    const told = new Set<NodeJS.Signals>();
    for (;;) {
      const lock = await DataLock.#tryAcquire(dataDir);
      if (lock !== undefined) return lock;
      const now = performance.now();
      if (now >= giveUpAt) return await DataLock.acquire(dataDir);
      const signal = now < begunAt + graceMs ? "SIGTERM" : "SIGKILL";
      const holder = await readHolder(dataDir);
      if (holder !== undefined && !told.has(signal)) {
        told.add(signal);
        await signalProcess(holder, signal);
      }
      await delay(POLL_MS);
    }
  }

  static async #tryAcquire(dataDir: string): Promise<DataLock | undefined> {
    await mkdir(dataDir, { recursive: true, mode: 0o700 });
    const file = await open(lockPath(dataDir), "a", 0o600);
    try {
      if (!tryLockFile(file.fd)) {
        await file.close();
        return undefined;
      }
      const self = await identifyProcess(process.pid);
      await file.truncate(0);
      await file.writeFile(JSON.stringify(self));
      return new DataLock(file);
    } catch (cause) {
      await file.close();
      throw cause;
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#file.close();
  }
}

function lockPath(dataDir: string): string {
  return join(dataDir, "agent.lock");
}

/** undefined while a holder is between taking the lock and writing its name, or gone. */
async function readHolder(dataDir: string): Promise<ProcessIdentity | undefined> {
  const text = await readFile(lockPath(dataDir), "utf8");
  if (text === "") return undefined;
  const holder = holderSchema.parse(JSON.parse(text));
  return (await isAlive(holder)) ? holder : undefined;
}
