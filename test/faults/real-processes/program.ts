/** A real program under supervision: started again when it ended, until it is not wanted any more. */
import { type ChildProcess, spawn } from "node:child_process";
import { closeSync, openSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";

export interface ProgramOptions {
  name: string;
  /** Network namespace that it runs in. */
  namespace: string;
  /** Looked at for each start. */
  command: () => readonly string[];
  env: () => Readonly<Record<string, string>>;
  logDir: string;
  /** What stands in its log once it has come up. */
  ready: string;
  /** A supervisor's pause before it starts it again. */
  restartMs: number;
}

const LAST_LINES = 3;

export class Program {
  readonly #options: ProgramOptions;
  #child: ChildProcess | undefined;
  #exited: Promise<void> = Promise.resolve();
  #starts = 0;
  /** While above zero, nobody starts it; the first is `start`'s to take away. */
  #holds = 1;
  #isBegun = false;
  #stalls = 0;
  #restart: NodeJS.Timeout | undefined;
  /** Called once at its next end. */
  #atNextEnd: (() => void) | undefined;
  /** Ends that nobody asked for, after it had come up. */
  readonly breakdowns: string[] = [];

  constructor(options: ProgramOptions) {
    this.#options = options;
  }

  get pid(): number | undefined {
    return this.#child?.pid;
  }

  get logFiles(): { who: string; path: string }[] {
    return Array.from({ length: this.#starts }, (_, index) => {
      const who = `${this.#options.name}x${index + 1}`;
      return { who, path: join(this.#options.logDir, `${who}.log`) };
    });
  }

  /** From now on it runs, whatever it ends of. */
  start(): void {
    if (this.#isBegun) return;
    this.#isBegun = true;
    this.#release();
  }

  /** Nothing keeps it down any more; it may be on its way up. */
  get isMeantToRun(): boolean {
    return this.#holds === 0;
  }

  /** SIGKILL; `meanwhile` is done while it is down. */
  async crash(downMs: number, meanwhile: () => void = () => undefined): Promise<void> {
    this.#holds += 1;
    this.#kill();
    await this.#exited;
    meanwhile();
    await sleep(downMs);
    this.#release();
  }

  /** It will kill itself: then it stays down for a while. */
  whenKilledStayDown(downMs: number): void {
    this.#atNextEnd = () => {
      this.#holds += 1;
      setTimeout(() => this.#release(), downMs);
    };
  }

  forgetNextEnd(): void {
    this.#atNextEnd = undefined;
  }

  /** SIGSTOP, and SIGCONT after `ms`, when no other stall lasts. */
  async stall(ms: number): Promise<void> {
    this.#stalls += 1;
    this.#signal("SIGSTOP");
    await sleep(ms);
    this.#stalls -= 1;
    if (this.#stalls <= 0) this.goOn();
  }

  goOn(): void {
    this.#stalls = 0;
    this.#signal("SIGCONT");
  }

  /** For good. */
  async end(): Promise<void> {
    this.#holds = Number.POSITIVE_INFINITY;
    clearTimeout(this.#restart);
    this.#kill();
    await this.#exited;
  }

  #release(): void {
    this.#holds -= 1;
    this.#spawn();
  }

  #spawn(): void {
    if (this.#holds > 0 || this.#child !== undefined) return;
    const { name, namespace, command, env, logDir } = this.#options;
    this.#starts += 1;
    const path = join(logDir, `${name}x${this.#starts}.log`);
    const log = openSync(path, "w");
    const child = spawn("nsenter", [`--net=${namespace}`, ...command()], {
      cwd: "/",
      env: { PATH: process.env["PATH"], ...env() },
      stdio: ["ignore", log, log],
    });
    closeSync(log);
    this.#child = child;
    this.#exited = new Promise((resolve) => {
      child.once("error", (cause) => {
        this.breakdowns.push(`${name} can't be started: ${cause.message}`);
        resolve();
      });
      child.once("exit", (code, signal) => {
        this.#child = undefined;
        if (signal !== "SIGKILL") this.#judgeEnd(code, signal, path);
        this.#atNextEnd?.();
        this.#atNextEnd = undefined;
        clearTimeout(this.#restart);
        this.#restart = setTimeout(() => this.#spawn(), this.#options.restartMs);
        resolve();
      });
    });
  }

  /** It may refuse to start while the world is broken; once it runs, it is to bear that. */
  #judgeEnd(code: number | null, signal: string | null, path: string): void {
    const log = readFileSync(path, "utf8");
    if (!log.includes(this.#options.ready)) return;
    const lines = log.trimEnd().split("\n").slice(-LAST_LINES).join(" | ");
    this.breakdowns.push(`${path} ended with ${signal ?? code}: ${lines.slice(-1_500)}`);
  }

  #kill(): void {
    this.#signal("SIGKILL");
  }

  #signal(signal: NodeJS.Signals): void {
    // Between its end and our hearing of it the pid is a zombie's, and nobody else's.
    this.#child?.kill(signal);
  }
}
