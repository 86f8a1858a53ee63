/**
 * A product of the tests' own: another data directory, other ports, started
 * and stopped by the commands that a user has.
 */
import assert from "node:assert/strict";
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { createHash } from "node:crypto";
import { closeSync, openSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { Api, eventually } from "./api.ts";

export const repoDir = resolve(fileURLToPath(new URL("..", import.meta.url)));

export const agentProgram = join(repoDir, "packages/host-agent/dist/rookery-agent.mjs");

export interface ProductOptions {
  dataDir: string;
  port: number;
  agentPort: number;
  /** More environment for `up`, such as shortened intervals or failpoints. */
  env?: Record<string, string>;
}

export class Product {
  readonly options: ProductOptions;

  constructor(options: ProductOptions) {
    this.options = options;
  }

  get agentDataDir(): string {
    return join(this.options.dataDir, "agent");
  }

  /** Brings up what does not run. */
  async up(env: Record<string, string> = {}): Promise<string> {
    return this.#script("up.mjs", ["--detach"], env);
  }

  async down(): Promise<string> {
    return this.#script("down.mjs", [], {});
  }

  /** `down`, and nothing of it stays on the machine, unless ROOKERY_KEEP asks for it. */
  async remove(): Promise<void> {
    const { dataDir } = this.options;
    await this.down();
    if (process.env["ROOKERY_KEEP"]) return;
    rmSync(dataDir, { recursive: true, force: true });
    rmSync(`/var/lib/rookery-${tagOf(dataDir)}`, { recursive: true, force: true });
  }

  api(): Api {
    const { api_url: url, api_key: key } = JSON.parse(
      readFileSync(join(this.options.dataDir, "credentials.json"), "utf8"),
    ) as { api_url: string; api_key: string };
    return new Api(url, key);
  }

  pid(name: "agent" | "control-plane" | "postgres"): number {
    return Number.parseInt(readFileSync(join(this.options.dataDir, "run", `${name}.pid`), "utf8"), 10);
  }

  log(name: "agent" | "control-plane"): string {
    return readFileSync(join(this.options.dataDir, "logs", `${name}.log`), "utf8");
  }

  /** SIGKILL, and until the process is gone. */
  async kill9(name: "agent" | "control-plane"): Promise<void> {
    const pid = this.pid(name);
    process.kill(pid, "SIGKILL");
    await eventually(`${name} (${pid}) is gone`, 10_000, () => (isAlive(pid) ? undefined : true));
  }

  /** What `up` does for a dead agent, without its looking at everything else first. */
  async restartAgent(): Promise<void> {
    const { dataDir, agentPort, env } = this.options;
    const since = Date.now();
    const child = spawnAgent({
      agentDataDir: this.agentDataDir,
      runtimeDir: runtimeDirOf(dataDir),
      port: agentPort,
      logFile: join(dataDir, "logs", "agent.log"),
      env: env ?? {},
    });
    writeFileSync(join(dataDir, "run", "agent.pid"), `${child.pid}\n`);
    const api = this.api();
    await eventually("the agent's heartbeat", 60_000, async () => {
      const { items } = await api.must<{ items: { status: string; last_heartbeat_at?: string }[] }>(
        200,
        "GET",
        "/v1/hosts",
      );
      return items.some(
        (host) => host.status === "online" && Date.parse(host.last_heartbeat_at ?? "") >= since,
      )
        ? true
        : undefined;
    });
  }

  async #script(name: string, args: string[], env: Record<string, string>): Promise<string> {
    const child = spawn("node", [join(repoDir, "scripts", name), ...args], {
      cwd: repoDir,
      env: {
        ...process.env,
        ROOKERY_DATA: this.options.dataDir,
        ROOKERY_PORT: String(this.options.port),
        ROOKERY_AGENT_PORT: String(this.options.agentPort),
        ...this.options.env,
        ...env,
      },
      stdio: ["ignore", "pipe", "pipe"],
    });
    let output = "";
    for (const stream of [child.stdout, child.stderr]) {
      stream.setEncoding("utf8").on("data", (text: string) => {
        output += text;
      });
    }
    const [code] = await once(child, "close");
    assert.equal(code, 0, `${name} failed:\n${output}`);
    return output;
  }
}

/** What marks a product's things outside of its data directory. */
function tagOf(dataDir: string): string {
  return createHash("sha256").update(dataDir).digest("hex").slice(0, 8);
}

/** Where `up` puts the sockets of a product's agent. */
function runtimeDirOf(dataDir: string): string {
  return `/run/rookery-${tagOf(dataDir)}/agent`;
}

export interface AgentProcess {
  agentDataDir: string;
  /** Default: the agent's own. */
  runtimeDir?: string;
  port: number;
  logFile: string;
  env: Record<string, string>;
}

/** Starts an agent that outlives the test, as `up` does; `args` go behind `serve`. */
export function spawnAgent(options: AgentProcess, args: readonly string[] = []): ChildProcess {
  const log = openSync(options.logFile, "a");
  const child = spawn(
    process.execPath,
    [agentProgram, "serve", "--address", `127.0.0.1:${options.port}`, ...args],
    {
      cwd: "/",
      env: {
        ...process.env,
        ...options.env,
        ROOKERY_AGENT_DATA: options.agentDataDir,
        ...(options.runtimeDir === undefined ? {} : { ROOKERY_RUNTIME_DIR: options.runtimeDir }),
      },
      detached: true,
      stdio: ["ignore", log, log],
    },
  );
  closeSync(log);
  child.unref();
  return child;
}

export function isAlive(pid: number): boolean {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, "utf8");
    return !/\) [ZX] /.test(stat);
  } catch (cause) {
    if (["ENOENT", "ESRCH"].includes((cause as NodeJS.ErrnoException).code ?? "")) return false;
    throw cause;
  }
}

export async function freePort(): Promise<number> {
  const server = createServer();
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  const address = server.address();
  assert.ok(address !== null && typeof address === "object");
  server.close();
  await once(server, "close");
  return address.port;
}
