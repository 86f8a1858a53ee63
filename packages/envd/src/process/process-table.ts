/**
 * The processes that envd started: those that run, and for a while the ends of
 * those that do not. Kept without a timer, so that an idle guest stays idle:
 * what is too old is dropped when the table is next used.
 */
import { ENDED_RETENTION_MS, MAX_ENDED } from "../limits.ts";
import type { RunningProcess } from "./running-process.ts";
import type { ProcessEnd } from "./subscription.ts";

export type Selector = { case: "pid"; value: number } | { case: "tag"; value: string };

export interface EndedProcess {
  pid: number;
  tag: string | undefined;
  end: ProcessEnd;
  endedAtMs: number;
}

export class ProcessTable {
  readonly #running = new Map<number, RunningProcess>();
  readonly #now: () => number;
  /** Oldest first. */
  #ended: EndedProcess[] = [];

  constructor(now: () => number = () => performance.now()) {
    this.#now = now;
  }

  get size(): number {
    return this.#running.size;
  }

  running(): Iterable<RunningProcess> {
    return this.#running.values();
  }

  add(process: RunningProcess): void {
    this.#running.set(process.pid, process);
    // The number belongs to a new process now.
    this.#ended = this.#ended.filter(({ pid }) => pid !== process.pid);
    this.#forgetOld();
  }

  end(process: RunningProcess, end: ProcessEnd): void {
    if (this.#running.get(process.pid) === process) this.#running.delete(process.pid);
    this.#ended.push({ pid: process.pid, tag: process.facts.tag, end, endedAtMs: this.#now() });
    this.#forgetOld();
  }

  /** Of several processes with one tag the last that was started. */
  find(selector: Selector): RunningProcess | undefined {
    if (selector.case === "pid") return this.#running.get(selector.value);
    let found: RunningProcess | undefined;
    for (const process of this.#running.values()) {
      if (process.facts.tag === selector.value) found = process;
    }
    return found;
  }

  findEnded(selector: Selector): EndedProcess | undefined {
    this.#forgetOld();
    return this.#ended.findLast((ended) =>
      selector.case === "pid" ? ended.pid === selector.value : ended.tag === selector.value,
    );
  }

  #forgetOld(): void {
    const oldest = this.#now() - ENDED_RETENTION_MS;
    const kept = this.#ended.findIndex(({ endedAtMs }) => endedAtMs >= oldest);
    const tooOld = kept === -1 ? this.#ended.length : kept;
    const tooMany = this.#ended.length - MAX_ENDED;
    this.#ended.splice(0, Math.max(tooOld, tooMany, 0));
  }
}
