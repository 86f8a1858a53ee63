/**
 * One reader's view of a process: events in order, with a bound on the output
 * that waits for it. A full subscription stops the pipes of the process, so a
 * slow reader slows the program and costs envd no memory.
 */
import { SUBSCRIBER_HIGH_BYTES, SUBSCRIBER_LOW_BYTES } from "../limits.ts";

export type OutputName = "stdout" | "stderr";

export interface ProcessEnd {
  exitCode: number;
  exited: boolean;
  status: string;
  error: string | undefined;
}

export type ProcessEvent =
  | { kind: "output"; from: OutputName; data: Uint8Array }
  | { kind: "end"; end: ProcessEnd };

export class Subscription {
  readonly #events: ProcessEvent[] = [];
  readonly #onDrained: () => void;
  #bytes = 0;
  #full = false;
  #wake: (() => void) | undefined;

  constructor(onDrained: () => void) {
    this.#onDrained = onDrained;
  }

  /** Takes no more before it is drained. */
  get full(): boolean {
    return this.#full;
  }

  push(event: ProcessEvent): void {
    this.#events.push(event);
    if (event.kind === "output") {
      this.#bytes += event.data.byteLength;
      this.#full ||= this.#bytes >= SUBSCRIBER_HIGH_BYTES;
    }
    this.#wake?.();
  }

  shift(): ProcessEvent | undefined {
    const event = this.#events.shift();
    if (event?.kind === "output") {
      this.#bytes -= event.data.byteLength;
      if (this.#full && this.#bytes <= SUBSCRIBER_LOW_BYTES) {
        this.#full = false;
        this.#onDrained();
      }
    }
    return event;
  }

  /** Resolves when an event is there or `signal` aborts, with false; or when `ms` have passed, with true. */
  wait(ms: number, signal: AbortSignal): Promise<boolean> {
    if (this.#events.length > 0 || signal.aborted) return Promise.resolve(false);
    return new Promise((resolve) => {
      const finish = (timedOut: boolean): void => {
        clearTimeout(timer);
        signal.removeEventListener("abort", wake);
        this.#wake = undefined;
        resolve(timedOut);
      };
      const wake = (): void => finish(false);
      const timer = setTimeout(() => finish(true), ms);
      signal.addEventListener("abort", wake);
      this.#wake = wake;
    });
  }
}
