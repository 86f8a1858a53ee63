/** What all programs of a run logged, in one order, for whoever replays a seed. */
import type { Logger } from "../../../packages/host-agent/src/sandbox-manager/deps.ts";

const LEVELS = ["debug", "info", "warn", "error"] as const;

export class Log {
  readonly lines: string[] = [];
  readonly #keep: boolean;
  readonly #beganAt = performance.now();
  #lastTakenMs = 0;

  constructor(options: { keep: boolean }) {
    this.#keep = options.keep;
  }

  note(facts: object, words: string): void {
    if (this.#keep) this.#add("run", "note", facts, words);
  }

  of(who: string): Logger {
    const at = (level: string) => (facts: object, words: string) => {
      if (this.#keep) this.#add(who, level, facts, words);
    };
    const [debug, info, warn, error] = LEVELS.map(at);
    return { debug: debug!, info: info!, warn: warn!, error: error! };
  }

  /** A log that a program of its own left, as pino writes it, put in where it belongs. */
  takeFile(who: string, text: string, beganAtMs: number): void {
    if (!this.#keep) return;
    for (const line of text.split("\n").filter(Boolean)) {
      const at = /"time":(\d+)/.exec(line)?.[1];
      const ms = at === undefined ? this.#lastTakenMs : Number(at) - beganAtMs;
      this.#lastTakenMs = ms;
      this.lines.push(`${ms.toFixed(0).padStart(6)} ${who} ${line}`);
    }
    this.lines.sort((a, b) => Number(a.slice(0, 6)) - Number(b.slice(0, 6)));
  }

  #add(who: string, level: string, facts: object, words: string): void {
    const ms = (performance.now() - this.#beganAt).toFixed(0).padStart(6);
    this.lines.push(`${ms} ${who} ${level} ${words} ${JSON.stringify(facts, shown)}`);
  }
}

function shown(_key: string, value: unknown): unknown {
  if (typeof value === "bigint") return `${value}`;
  if (!(value instanceof Error)) return value;
  const code = "code" in value ? String(value.code) : "";
  return `${code} ${value.message}${value.cause instanceof Error ? ` ← ${value.cause.message}` : ""}`;
}
