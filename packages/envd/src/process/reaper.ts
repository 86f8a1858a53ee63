/** Learns the exits of programs that we, and not Node, have started. */
import { constants } from "node:os";
import type { Native } from "../system/native.ts";

export interface Exit {
  code: number | null;
  signal: NodeJS.Signals | null;
}

export class Reaper {
  readonly #native: Native;
  readonly #waiting = new Map<number, (exit: Exit) => void>();

  constructor(native: Native) {
    this.#native = native;
    // Signals are not queued: one may stand for many exits.
    process.on("SIGCHLD", () => {
      for (const pid of this.#waiting.keys()) this.#collect(pid);
    });
  }

  /** Calls back once, never before it returns. Each started program must come here, or it stays a zombie. */
  onExit(pid: number, callback: (exit: Exit) => void): void {
    this.#waiting.set(pid, callback);
    // It may have exited before anybody waited for it.
    queueMicrotask(() => this.#collect(pid));
  }

  #collect(pid: number): void {
    const callback = this.#waiting.get(pid);
    if (callback === undefined) return;
    const status = this.#native.waitStatus(pid);
    if (status === undefined) return;
    this.#waiting.delete(pid);
    callback(exitOf(status));
  }
}

/** wait(2): the low 7 bits are the signal, or 0; the next byte up from 8 is the code. */
function exitOf(status: number): Exit {
  const number = status & 0x7f;
  if (number === 0) return { code: (status >> 8) & 0xff, signal: null };
  const name = Object.entries(constants.signals).find(([, value]) => value === number)?.[0];
  return { code: null, signal: (name ?? `SIG${number}`) as NodeJS.Signals };
}
