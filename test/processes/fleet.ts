/**
 * A fleet of real programs on a database of its own: the control plane's and the
 * agent's as they are released, the latter with simulated VMs, which outlive
 * their agent as real ones do. No root, no guest image, no network but loopback.
 */
import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { randomBytes } from "node:crypto";
import { chmodSync, mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";
import { inject } from "vitest";
import { TEMPLATE_DATABASE } from "../../packages/control-plane/src/db/testing/test-server.ts";
import { Api, eventually } from "../api.ts";
import { agentProgram, freePort, repoDir } from "../product.ts";
import { FleetDatabase, type Server } from "./database.ts";
import { Program } from "./program.ts";

const run = promisify(execFile);
const controlPlaneProgram = join(repoDir, "packages/control-plane/dist/control-plane.mjs");
/** On a machine that does much else, a program takes its time to start. */
export const START_MS = 60_000;

export interface Replica {
  program: Program;
  url: string;
  /** Resolves when it answers. */
  ready(this: void): Promise<void>;
}

export interface Agent {
  program: Program;
  hostId: string;
  dataDir: string;
}

export interface HostRow {
  id: string;
  status: string;
  sandboxes: number;
  last_heartbeat_at?: string;
}

export interface FleetOptions {
  /** Of every control plane and agent, such as shortened intervals. */
  env?: Record<string, string>;
}

export class Fleet implements AsyncDisposable {
  readonly dir: string;
  readonly database: FleetDatabase;
  readonly env: Record<string, string>;
  readonly #cleanup: AsyncDisposableStack;
  #key = "";

  private constructor(parts: Pick<Fleet, "dir" | "database" | "env"> & { cleanup: AsyncDisposableStack }) {
    ({ dir: this.dir, database: this.database, env: this.env } = parts);
    this.#cleanup = parts.cleanup;
  }

  static async open({ env = {} }: FleetOptions = {}): Promise<Fleet> {
    // Test files run side by side, and each wants them.
    await run("flock", [
      join(repoDir, ".rookery", "stamps", "bundles.lock"),
      ...[process.execPath, join(repoDir, "scripts", "bundles.mjs")],
    ]);
    await using cleanup = new AsyncDisposableStack();
    const dir = mkdtempSync(join(tmpdir(), "rk-fleet-"));
    chmodSync(dir, 0o755);
    cleanup.defer(() => rmSync(dir, { recursive: true, force: true }));
    const database = cleanup.use(
      await FleetDatabase.create(testServer(), `fleet_${randomBytes(6).toString("hex")}`, join(dir, "db")),
    );
    const fleet = new Fleet({
      dir,
      database,
      env: {
        // Dozens of starts of the same programs: what V8 made of them is kept.
        NODE_COMPILE_CACHE: join(tmpdir(), "rookery-compile-cache"),
        ROOKERY_SECRET_KEY: randomBytes(32).toString("hex"),
        ROOKERY_LOG_LEVEL: "info",
        ROOKERY_VMM: "simulated",
        ROOKERY_POOL: "0",
        ROOKERY_TEST: "1",
        ...env,
      },
      cleanup: cleanup.move(),
    });
    return fleet;
  }

  /** The API as an operator calls it, at this replica. */
  async api(replica: Replica): Promise<Api> {
    this.#key ||= await this.#bootstrap();
    return new Api(replica.url, this.#key);
  }

  /** A command of the control plane's program; its standard output. */
  async command(args: readonly string[], env: Record<string, string> = {}): Promise<string> {
    const { stdout } = await run(process.execPath, [controlPlaneProgram, ...args], {
      env: {
        PATH: process.env["PATH"],
        ...this.env,
        DATABASE_URL: this.database.url,
        ...env,
      },
    });
    return stdout;
  }

  /** The same as a program that can be killed. Not started yet. */
  control(name: string, args: readonly string[], env: Record<string, string> = {}): Program {
    const dir = join(this.dir, name);
    return this.#cleanup.use(
      new Program({
        name,
        argv: [controlPlaneProgram, ...args],
        env: {
          ...this.env,
          DATABASE_URL: this.database.url,
          ROOKERY_FAILPOINTS_DIR: dir,
          ...env,
        },
        dir,
      }),
    );
  }

  /** Not started yet. */
  async replica(name: string, env: Record<string, string> = {}): Promise<Replica> {
    const { ROOKERY_PORT: port = String(await freePort()) } = env;
    const url = `http://127.0.0.1:${port}`;
    const program = this.control(name, ["serve"], { ...env, ROOKERY_PORT: port });
    return { program, url, ready: () => isReady(program, url) };
  }

  /** Another one, migrated and empty. */
  async emptyDatabase(): Promise<FleetDatabase> {
    const name = `empty_${randomBytes(6).toString("hex")}`;
    return this.#cleanup.use(await FleetDatabase.create(testServer(), name, join(this.dir, name)));
  }

  /** With a host of its own, and not started: `start()` registers it by its one-time token. */
  async agent(
    name: string,
    { api, controlPlane, env = {} }: { api: Api; controlPlane: string; env?: Record<string, string> },
  ): Promise<Agent> {
    const { host, registration_token: token } = await api.must<{ host: HostRow; registration_token: string }>(
      201,
      "POST",
      "/v1/hosts",
      { name, type: "shared" },
    );
    const dir = join(this.dir, name);
    const dataDir = join(dir, "data");
    const program = this.#cleanup.use(
      new Program({
        name,
        // As in a unit file: the flags stay, and the token is good once.
        argv: [
          agentProgram,
          "serve",
          ...["--control-plane", controlPlane],
          ...["--register", token],
          ...["--address", `127.0.0.1:${await freePort()}`],
        ],
        env: { ...this.env, ROOKERY_AGENT_DATA: dataDir, ROOKERY_RUNTIME_DIR: join(dir, "run"), ...env },
        dir,
        failpointsDir: dataDir,
      }),
    );
    return { program, hostId: host.id, dataDir };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#cleanup.disposeAsync();
  }

  async #bootstrap(): Promise<string> {
    const answer = JSON.parse(await this.command(["bootstrap"])) as { api_key: string };
    return answer.api_key;
  }
}

function testServer(): Server {
  return { socketDir: inject("postgresSocketDir"), template: TEMPLATE_DATABASE };
}

async function isReady(program: Program, url: string): Promise<void> {
  await eventually(`${program.name} is ready\n${program.tail()}`, START_MS, () =>
    fetch(`${url}/readyz`).then(
      ({ ok }) => (ok ? true : undefined),
      () => undefined,
    ),
  );
}

/** Programs on their way to what the sandbox's status is to be. */
export async function becomes(api: Api, ids: readonly string[], status: string): Promise<void> {
  await eventually(`${ids.length} sandboxes are ${status}`, START_MS, async () => {
    const seen = await Promise.all(ids.map((id) => api.get(id)));
    return seen.every((sandbox) => sandbox.status === status) ? true : undefined;
  });
}

/** Waits for a heartbeat of the host after `since` (by the database's clock, which is this machine's). */
export async function heard(api: Api, agent: Agent, since: number): Promise<void> {
  await eventually(`a heartbeat of ${agent.program.name}\n${agent.program.tail()}`, START_MS, async () => {
    const { last_heartbeat_at: at, status } = await api.must<HostRow>(
      200,
      "GET",
      `/v1/hosts/${agent.hostId}`,
    );
    return status === "online" && at !== undefined && Date.parse(at) > since ? true : undefined;
  });
}

/** What the agent proves itself with, as it lies on its disk. */
export function credentialsOf(agent: Agent): { accessToken: string; refreshToken: string } {
  const text = readFileSync(join(agent.dataDir, "credentials.json"), "utf8");
  const credentials = JSON.parse(text) as { accessToken: string; refreshToken: string };
  assert.ok(credentials.refreshToken);
  return credentials;
}
