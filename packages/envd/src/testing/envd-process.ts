/**
 * A real envd for tests: the bundle, as root, on a free port of the loopback.
 *
 * It has its own UTS and mount namespaces and private copies of the files that
 * /init writes, so the machine that runs the tests keeps its names. What /init
 * does to the kernel's pool and, within 20 ms, to the clock is harmless there.
 */
import { spawn } from "node:child_process";
import type { ChildProcess } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { randomBytes } from "node:crypto";
import { ENVD_NODE_OPTIONS, buildEnvd } from "../../build.mjs";

export const ACCESS_TOKEN = "token-of-the-tests";
const START_TIMEOUT_MS = 20_000;
const MAX_STDERR_LINES = 50;

export interface InitBody {
  restoreId: string;
  sandboxId: string;
  hostname: string;
  machineId: string;
  timestamp: string;
  entropy: string;
  envVars: Record<string, string>;
  accessToken: string;
  defaultUser: string;
  defaultWorkdir?: string;
  growRootFs: boolean;
}

export function initBody(changes: Partial<InitBody> = {}): InitBody {
  return {
    restoreId: randomBytes(16).toString("hex"),
    sandboxId: "sb000000000000000000",
    hostname: "sb000000000000000000",
    machineId: randomBytes(16).toString("hex"),
    timestamp: new Date().toISOString(),
    entropy: randomBytes(64).toString("base64"),
    envVars: { FROM_INIT: "yes" },
    accessToken: ACCESS_TOKEN,
    defaultUser: "nobody",
    defaultWorkdir: "/tmp",
    growRootFs: false,
    ...changes,
  };
}

export class EnvdProcess implements AsyncDisposable {
  readonly url: string;
  /** A folder for the test's own files, removed at the end. */
  readonly directory: string;
  readonly #child: ChildProcess;
  readonly #stderr: string[];

  private constructor(url: string, directory: string, child: ChildProcess, stderr: string[]) {
    this.#stderr = stderr;
    this.url = url;
    this.directory = directory;
    this.#child = child;
  }

  static async start({ hostAddress = "127.0.0.1" } = {}): Promise<EnvdProcess> {
    const directory = mkdtempSync(join(tmpdir(), "envd-test-"));
    const { bundle } = await buildEnvd(join(directory, "dist"));
    const binds = ["hostname", "hosts", "machine-id"].map((name) => {
      writeFileSync(join(directory, name), name === "hosts" ? "127.0.0.1 localhost\n127.0.1.1 old\n" : "");
      return `touch /etc/${name} && mount --bind ${join(directory, name)} /etc/${name}`;
    });
    // What the test runner's own starter left open is not envd's.
    const closeInherited =
      'for fd in /proc/$$/fd/*; do fd=${fd##*/}; if [ $fd -gt 2 ]; then eval exec "$fd>&-"; fi; done';
    const script = `${closeInherited}; ${binds.join(" && ")} && exec setpriv --pdeathsig KILL "$@"`;
    const child = spawn(
      "unshare",
      ["--mount", "--uts", "bash", "-c", script, "bash", process.execPath, ...ENVD_NODE_OPTIONS, bundle],
      {
        env: {
          PATH: process.env["PATH"],
          ROOKERY_ENVD_PORT: "0",
          ROOKERY_ENVD_ADDRESS: "127.0.0.1",
          ROOKERY_HOST_ADDRESS: hostAddress,
          ROOKERY_ENVD_DEBUG: "1",
        },
        stdio: ["ignore", "ignore", "pipe"],
      },
    );
    const stderr: string[] = [];
    const port = await listeningPort(child, stderr);
    return new EnvdProcess(`http://127.0.0.1:${port}`, directory, child, stderr);
  }

  /** unshare, bash and setpriv become node: one process from first to last. */
  get pid(): number {
    return this.#child.pid!;
  }

  /** Throws with what it said last, when it has ended. */
  assertAlive(): void {
    if (this.#isAlive) return;
    throw new Error(`envd has ended: ${this.#stderr.join("\n")}`);
  }

  get #isAlive(): boolean {
    return this.#child.exitCode === null && this.#child.signalCode === null;
  }

  init(body: unknown = initBody()): Promise<Response> {
    return fetch(`${this.url}/init`, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(body),
    });
  }

  /** With the access token, unless headers say otherwise. */
  fetch(path: string, { headers, ...options }: RequestInit = {}): Promise<Response> {
    const all = new Headers(headers);
    if (!all.has("x-access-token")) all.set("x-access-token", ACCESS_TOKEN);
    return fetch(this.url + path, { ...options, headers: all });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#isAlive) {
      const exited = once(this.#child, "exit");
      this.#child.kill("SIGKILL");
      await exited;
    }
    rmSync(this.directory, { recursive: true, force: true });
  }
}

/** Goes on reading what envd says: its last lines are in `stderr`. */
function listeningPort(child: ChildProcess, stderr: string[]): Promise<number> {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => child.kill("SIGKILL"), START_TIMEOUT_MS);
    createInterface({ input: child.stderr! }).on("line", (line) => {
      stderr.push(line);
      stderr.splice(0, stderr.length - MAX_STDERR_LINES);
      const port = /listening on .*"port":(\d+)/.exec(line)?.[1];
      if (port === undefined) return;
      clearTimeout(timer);
      resolve(Number(port));
    });
    child.once("exit", () => {
      clearTimeout(timer);
      reject(new Error(`envd did not start: ${stderr.join("\n")}`));
    });
  });
}
