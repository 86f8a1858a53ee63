/**
 * `npm run bench -- fleet-scale [--agents 500] [--sandboxes 100] [--concurrency 128] [--data DIR]`:
 * a control plane and PostgreSQL as `up` starts them, and a fleet of simulated
 * agents (in one process, each registered by its one-time token) that is filled
 * through the API. `--sandboxes` is the number for each agent.
 *
 * What is measured is the control plane and its database. Guests are simulated,
 * so their time is drawn and not worked; agents and this program share the
 * machine with what is measured, and times over the wire show that.
 */
import { spawn } from "node:child_process";
import type { ChildProcessByStdio } from "node:child_process";
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { join } from "node:path";
import { createInterface } from "node:readline";
import type { Readable, Writable } from "node:stream";
import { parseArgs } from "node:util";
import { eventually } from "../test/api.ts";
import type { Api } from "../test/api.ts";
import { freePort, Product, repoDir } from "../test/product.ts";
import { median, print, quantile, timed } from "./measure.ts";

/** Times that the lists are asked for, at each size. */
const LISTS = 400;
/** The size that the largest one is compared with. */
const SMALL = 500;
/** Rounds of the monitor that the steady state is measured over. */
const ROUNDS = 3;
const ROUND_MS = 30_000;
/** Cold start of a simulated template, and then some for a busy machine. */
const START_TIMEOUT_MS = 600_000;
const TICKS_PER_SECOND = 100;
/** DESIGN's aims. */
const ROUND_AIM_MS = 5_000;
const LIST_AIM_RATIO = 2;

interface Fleet {
  input: Writable;
  lines: AsyncIterator<string>;
  pid: number;
  end(): Promise<void>;
}

interface Usage {
  agents: number;
  vms: number;
  rss_mib: number;
  heap_mib: number;
  cpu_ms: number;
  fds: number;
  timers: number;
}

export async function fleetScale(argv: readonly string[]): Promise<void> {
  const { values } = parseArgs({
    args: [...argv],
    options: {
      agents: { type: "string", default: "500" },
      sandboxes: { type: "string", default: "100" },
      concurrency: { type: "string", default: "128" },
      data: { type: "string", default: existsSync("/dev/shm") ? "/dev/shm" : join(repoDir, ".rookery") },
    },
  });
  const agents = wholeNumber(values.agents);
  const total = agents * wholeNumber(values.sandboxes);
  const concurrency = wholeNumber(values.concurrency);
  mkdirSync(join(repoDir, ".rookery"), { recursive: true });
  const dataDir = mkdtempSync(join(repoDir, ".rookery", "bench-"));
  const agentsDir = mkdtempSync(join(values.data, "rookery-fleet-"));
  const product = new Product({
    dataDir,
    port: await freePort(),
    agentPort: await freePort(),
    env: {
      ROOKERY_VMM: "simulated",
      ROOKERY_POOL: "0",
      ROOKERY_MAX_SANDBOXES_PER_TEAM: String(10 * total + 1_000),
      ROOKERY_REQUESTS_PER_MINUTE: "0",
      ROOKERY_HOST_CHECK_MS: String(ROUND_MS),
      ROOKERY_LOG_LEVEL: "warn",
    },
  });
  let fleet: Fleet | undefined;
  try {
    await product.up();
    const api = product.api();
    fleet = startFleet(api.url, agentsDir);
    await startAgents(fleet, api, agents);
    note(`${agents} agents are up`, await usageOf(fleet));

    const created: number[] = [];
    await fill(api, { count: Math.min(SMALL, total), concurrency, created });
    const small = await lists(api);
    created.length = 0;
    const begun = meter(product, fleet.pid);
    const filling = performance.now();
    const failures = await fill(api, { count: Math.max(total - SMALL, SMALL), concurrency, created });
    const seconds = (performance.now() - filling) / 1000;
    const spent = begun();
    report("fleet-create-rate", "1/s", created.length / seconds, { runs: created.length });
    report("fleet-create-p50", "ms", quantile(created, 0.5), { runs: created.length });
    report("fleet-create-p99", "ms", quantile(created, 0.99), { runs: created.length });
    report("fleet-create-failures", "1", failures, { runs: created.length });
    for (const [who, ms] of Object.entries(spent)) {
      report(`fleet-create-cpu-${who}`, "ms", ms / created.length, { runs: created.length });
    }
    note(`${total} sandboxes are there`, await usageOf(fleet));

    await steady(product, fleet);
    const large = await lists(api);
    report("fleet-list-p50", "ms", large.p50, { floor: small.p50, runs: LISTS });
    report("fleet-list-p99", "ms", large.p99, { floor: small.p99, runs: LISTS });
    report("fleet-list-p99-over-healthz", "×", large.p99 / large.healthz, {
      floor: (small.p99 / small.healthz) * LIST_AIM_RATIO,
      runs: LISTS,
    });
    note("at the end", await usageOf(fleet));
  } finally {
    await fleet?.end();
    await product.remove();
    rmSync(agentsDir, { recursive: true, force: true });
  }
}

/** All CPU of control plane and database while nothing is asked of them but heartbeats, monitor and events. */
async function steady(product: Product, fleet: Fleet): Promise<void> {
  // The round in which the last creates still showed is over.
  await delay(ROUND_MS);
  const rounds: Record<string, number>[] = [];
  for (let round = 0; round < ROUNDS; round += 1) {
    const begun = meter(product, fleet.pid);
    await delay(ROUND_MS);
    rounds.push(begun());
  }
  const of = (who: string): number => median(rounds.map((round) => round[who] ?? 0));
  report("fleet-round-control-plane", "ms", of("control-plane"), { runs: ROUNDS });
  report("fleet-round-postgres", "ms", of("postgres"), { runs: ROUNDS });
  report("fleet-round", "ms", of("control-plane") + of("postgres"), { floor: ROUND_AIM_MS, runs: ROUNDS });
  report("fleet-round-agents", "ms", of("agents"), { runs: ROUNDS });
}

/**
 * Creates `count` sandboxes, `concurrency` at a time; their milliseconds are added
 * to `created`. The answer is how many tries failed: on a machine that does much
 * else, some time out. Gives up when more fail than are made.
 */
async function fill(
  api: Api,
  { count, concurrency, created }: { count: number; concurrency: number; created: number[] },
): Promise<number> {
  let left = count;
  let failures = 0;
  let said = Date.now();
  const worker = async (): Promise<void> => {
    while (left > 0) {
      left -= 1;
      try {
        created.push(await timed(() => api.create({ timeout_sec: 0 })));
      } catch (cause) {
        left += 1;
        failures += 1;
        if (failures > created.length + concurrency) throw cause;
        if (failures <= 3) note(`a create failed: ${String(cause).slice(0, 300)}`, {});
      }
      if (Date.now() - said < 30_000) continue;
      said = Date.now();
      note(`${created.length} of ${count} created`, { failures });
    }
  };
  await Promise.all(Array.from({ length: concurrency }, worker));
  return failures;
}

/** One after the other, in turns with a call that does nothing. */
async function lists(api: Api): Promise<{ p50: number; p99: number; healthz: number }> {
  const values: number[] = [];
  const idle: number[] = [];
  for (let run = -20; run < LISTS; run += 1) {
    const ms = await timed(() => api.must(200, "GET", "/v1/sandboxes?limit=50"));
    const nothing = await timed(() => api.must(200, "GET", "/healthz"));
    if (run < 0) continue;
    values.push(ms);
    idle.push(nothing);
  }
  return { p50: quantile(values, 0.5), p99: quantile(values, 0.99), healthz: quantile(idle, 0.99) };
}

function startFleet(url: string, dataDir: string): Fleet {
  const child: ChildProcessByStdio<Writable, Readable, null> = spawn(
    process.execPath,
    [join(repoDir, "packages/host-agent/src/simulated/fleet-main.ts"), url, dataDir],
    {
      env: { ...process.env, ROOKERY_POOL: "0", ROOKERY_LOG_LEVEL: "error", NODE_NO_WARNINGS: "1" },
      stdio: ["pipe", "pipe", "inherit"],
    },
  );
  const ended = new Promise<void>((resolve) => child.once("exit", () => resolve()));
  if (child.pid === undefined) throw new Error("the fleet did not start");
  return {
    input: child.stdin,
    lines: createInterface({ input: child.stdout })[Symbol.asyncIterator](),
    pid: child.pid,
    end: async () => {
      child.stdin.end();
      const killer = setTimeout(() => child.kill("SIGKILL"), 60_000);
      await ended;
      clearTimeout(killer);
    },
  };
}

async function startAgents(fleet: Fleet, api: Api, count: number): Promise<void> {
  for (let index = 0; index < count; index += 1) {
    const name = `agent-${index}`;
    const made = await api.must<{ registration_token: string }>(201, "POST", "/v1/hosts", {
      name,
      type: "shared",
    });
    tell(fleet, { start: { name, token: made.registration_token, seed: index + 1 } });
  }
  for (let index = 0; index < count; index += 1) {
    const line = await answerOf<{ started?: object }>(fleet);
    if (line.started === undefined) throw new Error(`an agent did not start: ${JSON.stringify(line)}`);
  }
  await eventually("all hosts are online", START_TIMEOUT_MS, async () => {
    let online = 0;
    for (let cursor = ""; ;) {
      const page = await api.must<{ items: { status: string }[]; next_cursor?: string }>(
        200,
        "GET",
        `/v1/hosts?limit=100${cursor}`,
      );
      online += page.items.filter(({ status }) => status === "online").length;
      if (page.next_cursor === undefined) break;
      cursor = `&cursor=${encodeURIComponent(page.next_cursor)}`;
    }
    return online > count ? true : undefined; // `up` has one of its own
  });
}

async function usageOf(fleet: Fleet): Promise<Usage> {
  tell(fleet, { usage: true });
  return (await answerOf<{ usage: Usage }>(fleet)).usage;
}

function tell({ input }: Fleet, value: object): void {
  input.write(`${JSON.stringify(value)}\n`);
}

async function answerOf<T>({ lines }: Fleet): Promise<T> {
  const { value, done } = await lines.next();
  if (done === true) throw new Error("the fleet ended");
  return JSON.parse(value) as T;
}

/** Starts counting; the answer gives the CPU milliseconds of each since then. */
function meter(product: Product, fleetPid: number): () => Record<string, number> {
  const read = (): Record<string, number> => ({
    "control-plane": cpuMs([product.pid("control-plane")]),
    postgres: cpuMs(familyOf(product.pid("postgres"))),
    agents: cpuMs([fleetPid]),
  });
  const before = read();
  return () => {
    const after = read();
    return Object.fromEntries(Object.entries(after).map(([who, ms]) => [who, ms - (before[who] ?? 0)]));
  };
}

/** Of processes and of their children that have ended (proc_pid_stat(5), fields 14 to 17). */
function cpuMs(pids: readonly number[]): number {
  let ticks = 0;
  for (const pid of pids) {
    const fields = statOf(pid);
    for (const field of [11, 12, 13, 14]) ticks += Number(fields[field] ?? 0);
  }
  return (ticks * 1000) / TICKS_PER_SECOND;
}

/** A process and its children: PostgreSQL's server processes have no others. */
function familyOf(pid: number): number[] {
  const children = readdirSync("/proc")
    .filter((name) => /^\d+$/.test(name))
    .map(Number)
    .filter((child) => statOf(child)[1] === String(pid));
  return [pid, ...children];
}

/** Fields from the third on; none when it has ended meanwhile. */
function statOf(pid: number): string[] {
  try {
    const text = readFileSync(`/proc/${pid}/stat`, "utf8");
    return text.slice(text.lastIndexOf(")") + 2).split(" ");
  } catch {
    return [];
  }
}

function report(
  name: string,
  unit: string,
  value: number,
  { floor = value, runs }: { floor?: number; runs: number },
): void {
  const round = (number: number): number => Math.round(number * 1000) / 1000;
  const ratio = floor === 0 ? 1 : value / floor;
  print({ name, value: round(value), unit, floor: round(floor), ratio: round(ratio), runs, spread: 0 });
}

/** For who watches; results go to standard output alone. */
function note(what: string, facts: object): void {
  process.stderr.write(`${new Date().toISOString()} ${what} ${JSON.stringify(facts)}\n`);
}

function wholeNumber(text: string): number {
  if (!/^[1-9]\d{0,6}$/.test(text)) throw new Error(`${text}: must be a whole number above 0`);
  return Number(text);
}

const delay = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));
