/**
 * Failpoints: named places in a program where a test makes it fail or die. Here
 * because an exchange between two programs has them on both its sides.
 *
 * Each step of an operation has one before and one after its effect
 * (`create.thaw.before`). In production nothing is armed, and reaching one costs
 * a look at a flag. Armed mode comes from a specification in the program's
 * environment, from a control file that a test writes while the program runs,
 * or from a test in the same process.
 *
 * In armed mode every failpoint that is reached is recorded, also in a file that
 * outlives a SIGKILL, so that a test can tell "survived" from "never reached".
 */
import { appendFileSync, readFileSync, renameSync, writeFileSync } from "node:fs";
import { RookeryError } from "./errors.ts";

/** `halt` never comes back: in one process with the test, it is what a SIGKILL is to whoever comes next. */
export type FailpointAction = "error" | "kill" | "halt";

export interface FailpointOptions {
  /** `NAME=error|kill[*TIMES]`, comma-separated; without TIMES, every time. */
  specification?: string | undefined;
  /** A JSON object of NAME → `error|kill[*TIMES]`, looked at each time a failpoint is reached. */
  controlFile?: string | undefined;
  /** Names of reached failpoints are appended here, one a line. */
  hitsFile?: string | undefined;
  /** Names that exist; arming another one is a mistake in the test. */
  known: readonly string[];
}

interface Armed {
  action: FailpointAction;
  timesLeft: number;
}

/** What reaches one where nothing else of failpoints is needed. */
export type Reach = (name: string) => void | Promise<void>;

export class Failpoints {
  readonly known: ReadonlySet<string>;
  /** Failpoints reached in this process while armed mode was on. */
  readonly hits = new Set<string>();
  readonly #armed = new Map<string, Armed>();
  readonly #controlFile: string | undefined;
  readonly #hitsFile: string | undefined;
  #recording: boolean;
  readonly #halted = Promise.withResolvers<string>();

  constructor(options: FailpointOptions) {
    this.known = new Set(options.known);
    this.#controlFile = options.controlFile;
    this.#hitsFile = options.hitsFile;
    for (const item of (options.specification ?? "").split(",").filter(Boolean)) {
      const [name = "", action = ""] = item.split("=");
      this.#arm(name, parseAction(action));
    }
    this.#recording = options.controlFile !== undefined || this.#armed.size > 0;
  }

  /** For tests in the same process. */
  arm(name: string, action: FailpointAction, times = Number.POSITIVE_INFINITY): void {
    this.#arm(name, { action, timesLeft: times });
    this.#recording = true;
  }

  disarmAll(): void {
    this.#armed.clear();
  }

  /** Records hits without failing anything. */
  record(): void {
    this.#recording = true;
  }

  /** The failpoint that halted, once one did. */
  get halted(): Promise<string> {
    return this.#halted.promise;
  }

  /** Throws, or ends this process, when a test asked for it here. What it returns is to be awaited. */
  reach(name: string): Promise<never> | undefined {
    if (!this.#recording) return undefined;
    if (!this.known.has(name)) throw new Error(`failpoint ${name} is not in the registry`);
    this.hits.add(name);
    if (this.#hitsFile !== undefined) appendFileSync(this.#hitsFile, `${name}\n`);
    const action = this.#takeFromControlFile(name) ?? this.#take(name);
    if (action === "kill") process.kill(process.pid, "SIGKILL");
    if (action === "error") throw new RookeryError("host_error", `failpoint ${name}`);
    if (action !== "halt") return undefined;
    this.#halted.resolve(name);
    return new Promise<never>(() => undefined);
  }

  #arm(name: string, armed: Armed): void {
    if (!this.known.has(name)) throw new Error(`failpoint ${name} is not in the registry`);
    this.#armed.set(name, armed);
  }

  #take(name: string): FailpointAction | undefined {
    const armed = this.#armed.get(name);
    if (armed === undefined || armed.timesLeft <= 0) return undefined;
    armed.timesLeft -= 1;
    return armed.action;
  }

  /** Written back before it acts: a program that starts again after a kill finds one time fewer. */
  #takeFromControlFile(name: string): FailpointAction | undefined {
    if (this.#controlFile === undefined) return undefined;
    const control = readControlFile(this.#controlFile);
    const text = control?.[name];
    if (control === undefined || text === undefined) return undefined;
    const { action, timesLeft } = parseAction(text);
    if (timesLeft <= 0) return undefined;
    if (Number.isFinite(timesLeft)) {
      const temporary = `${this.#controlFile}.${process.pid}`;
      writeFileSync(temporary, JSON.stringify({ ...control, [name]: `${action}*${timesLeft - 1}` }));
      renameSync(temporary, this.#controlFile);
    }
    return action;
  }
}

/** `STEP.before` and `STEP.after` for each step of each operation. */
export function failpointNames(operations: Readonly<Record<string, readonly { name: string }[]>>): string[] {
  return Object.entries(operations).flatMap(([operation, steps]) =>
    steps.flatMap((step) => [`${operation}.${step.name}.before`, `${operation}.${step.name}.after`]),
  );
}

/** A test's own file, written whole. */
function readControlFile(path: string): Record<string, string> | undefined {
  try {
    return JSON.parse(readFileSync(path, "utf8")) as Record<string, string>;
  } catch (cause) {
    if (cause instanceof Error && "code" in cause && cause.code === "ENOENT") return undefined;
    throw cause;
  }
}

function parseAction(text: string): Armed {
  const match = /^(error|kill|halt)(?:\*(\d+))?$/.exec(text);
  if (match === null) throw new Error(`not a failpoint action: ${JSON.stringify(text)}`);
  return {
    action: match[1] === "kill" ? "kill" : match[1] === "halt" ? "halt" : "error",
    timesLeft: match[2] === undefined ? Number.POSITIVE_INFINITY : Number(match[2]),
  };
}
