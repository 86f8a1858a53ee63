/**
 * One program of a fleet under test: started, ended in every way, and started
 * again as systemd would, but no sooner than the test lets it when it was killed.
 */
import assert from "node:assert/strict";
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { closeSync, existsSync, mkdirSync, openSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { eventually } from "../api.ts";

/** RestartSec of deploy/systemd, shortened. */
const RESTART_MS = 100;
const LOG_TAIL_BYTES = 4_000;

export interface ProgramOptions {
  name: string;
  argv: readonly string[];
  env: Readonly<Record<string, string>>;
  /** Its log and its failpoint files. */
  dir: string;
  /** Where its control file and its hits are; default: `dir`. */
  failpointsDir?: string;
}

export class Program implements AsyncDisposable {
  readonly name: string;
  readonly #options: ProgramOptions;
  #child: ChildProcess | undefined;
  #isWanted = false;
  #failures = 0;

  constructor(options: ProgramOptions) {
    this.name = options.name;
    this.#options = options;
    mkdirSync(options.dir, { recursive: true });
  }

  get isRunning(): boolean {
    return this.#child !== undefined;
  }

  get pid(): number {
    assert.ok(this.#child?.pid, `${this.name} does not run`);
    return this.#child.pid;
  }

  /** How often it ended by itself with a failure, and was started again. */
  get failures(): number {
    return this.#failures;
  }

  start(extraArgs: readonly string[] = []): void {
    assert.ok(!this.#child, `${this.name} runs`);
    this.#isWanted = true;
    const { argv, env, dir } = this.#options;
    const log = openSync(join(dir, `${this.name}.log`), "a");
    const child = spawn(process.execPath, [...argv, ...extraArgs], {
      cwd: "/",
      env: { PATH: process.env["PATH"], NODE_NO_WARNINGS: "1", ...env },
      stdio: ["ignore", log, log],
    });
    closeSync(log);
    this.#child = child;
    child.once("exit", (code) => {
      this.#child = undefined;
      if (!this.#isWanted || code === null) return;
      this.#failures += 1;
      setTimeout(() => {
        if (this.#isWanted && !this.#child) this.start(extraArgs);
      }, RESTART_MS);
    });
  }

  /** Until it is gone; it stays down until it is started. */
  async end(signal: NodeJS.Signals): Promise<void> {
    this.#isWanted = false;
    const child = this.#child;
    if (!child) return;
    const gone = once(child, "exit");
    child.kill(signal);
    await gone;
  }

  kill(): Promise<void> {
    return this.end("SIGKILL");
  }

  signal(signal: NodeJS.Signals): void {
    process.kill(this.pid, signal);
  }

  /** Its failpoint `name` ends it by SIGKILL, once. */
  armKill(name: string): void {
    mkdirSync(this.#failpointsDir, { recursive: true });
    writeFileSync(join(this.#failpointsDir, "failpoints.json"), JSON.stringify({ [name]: "kill*1" }));
  }

  /** Waits until the failpoint that was armed has killed it. */
  async diedAt(name: string, timeoutMs: number): Promise<void> {
    await eventually(`${this.name} died at ${name}\n${this.tail()}`, timeoutMs, () => {
      const armed = JSON.parse(readFileSync(join(this.#failpointsDir, "failpoints.json"), "utf8")) as object;
      return !this.#child && (armed as Record<string, string>)[name] === "kill*0" ? true : undefined;
    });
  }

  /** Failpoints that it ever reached. */
  hits(): Set<string> {
    const file = join(this.#failpointsDir, "failpoint-hits");
    return new Set(existsSync(file) ? readFileSync(file, "utf8").split("\n").filter(Boolean) : []);
  }

  log(): string {
    return readFileSync(join(this.#options.dir, `${this.name}.log`), "utf8");
  }

  tail(): string {
    return existsSync(join(this.#options.dir, `${this.name}.log`)) ? this.log().slice(-LOG_TAIL_BYTES) : "";
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#isWanted = false;
    // One that a test stopped takes no signal but this.
    await this.kill();
  }

  get #failpointsDir(): string {
    return this.#options.failpointsDir ?? this.#options.dir;
  }
}
