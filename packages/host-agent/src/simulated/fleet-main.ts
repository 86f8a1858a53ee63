/**
 * A fleet of simulated agents in one process, for scale tests.
 *
 *   node fleet-main.ts CONTROL_PLANE_URL DATA_DIR
 *
 * Standard input has a JSON value a line: `{"start":{"name","token","seed"}}`
 * registers and starts an agent with the data directory DATA_DIR/NAME, and
 * `{"usage":true}` asks for what the process uses. Each is answered by a line:
 * `{"started":{"name","host_id","address"}}`, `{"failed":{"name","message"}}`, or
 * `{"usage":{…}}`. The end of the input ends them all. Settings of the agents
 * are the program's environment, as for `rookery-agent`.
 */
import { readdirSync } from "node:fs";
import { join } from "node:path";
import { createInterface } from "node:readline";
import pLimit from "p-limit";
import { pino } from "pino";
import { z } from "zod";
import { startSimulatedAgent } from "./start-simulated-agent.ts";
import type { SimulatedAgent } from "./start-simulated-agent.ts";

/** Registrations under way: more would only wait for each other. */
const STARTS_AT_ONCE = 8;
const DEFAULT_LOG_LEVEL = "warn";

const order = z.union([
  z.object({ start: z.object({ name: z.string().min(1), token: z.string().min(1), seed: z.int() }) }),
  z.object({ usage: z.literal(true) }),
]);

const [controlPlaneUrl, dataDir] = process.argv.slice(2);
if (controlPlaneUrl === undefined || dataDir === undefined) {
  throw new Error("usage: fleet-main.ts CONTROL_PLANE_URL DATA_DIR");
}
const environment: Record<string, string> = {};
for (const [name, value] of Object.entries(process.env)) {
  if (name.startsWith("ROOKERY_") && value !== undefined) environment[name] = value;
}
const logger = pino(
  { level: environment["ROOKERY_LOG_LEVEL"] ?? DEFAULT_LOG_LEVEL, base: {} },
  pino.destination({ fd: 2, sync: true }),
);
const agents = new Map<string, SimulatedAgent>();
const atOnce = pLimit(STARTS_AT_ONCE);
const answer = (value: object): void => void process.stdout.write(`${JSON.stringify(value)}\n`);

/** Returns when it is up, or will never be. */
async function start({ name, token, seed }: { name: string; token: string; seed: number }): Promise<void> {
  const fail = (cause: unknown): void => {
    logger.error({ agent: name, err: cause }, "an agent ended by a fault");
    answer({ failed: { name, message: cause instanceof Error ? cause.message : String(cause) } });
  };
  try {
    const agent = await startSimulatedAgent({
      dataDir: join(dataDir!, name),
      controlPlaneUrl: controlPlaneUrl!,
      registrationToken: token,
      environment,
      seed,
      logger: logger.child({ agent: name }),
    });
    agents.set(name, agent);
    agent.ended.catch(fail);
    const { host, port } = agent.address;
    answer({ started: { name, host_id: agent.hostId, address: `${host}:${port}` } });
  } catch (cause) {
    fail(cause);
  }
}

function usage(): object {
  const { rss, heapUsed } = process.memoryUsage();
  const { user, system } = process.cpuUsage();
  return {
    agents: agents.size,
    vms: [...agents.values()].reduce((sum, { processes }) => sum + processes.all().length, 0),
    rss_mib: Math.round(rss / 2 ** 20),
    heap_mib: Math.round(heapUsed / 2 ** 20),
    cpu_ms: Math.round((user + system) / 1000),
    fds: readdirSync("/proc/self/fd").length,
    timers: process.getActiveResourcesInfo().filter((kind) => kind === "Timeout").length,
  };
}

for await (const line of createInterface({ input: process.stdin })) {
  const parsed = order.parse(JSON.parse(line));
  // Each answers for itself, whether it comes through or not.
  if ("start" in parsed) void atOnce(() => start(parsed.start));
  else answer({ usage: usage() });
}
await Promise.allSettled([...agents.values()].map((agent) => agent.stop()));
