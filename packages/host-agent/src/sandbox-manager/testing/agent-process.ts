/**
 * The agent's core as a process of its own, to be killed: plays a scenario on
 * the machine in ROOT until it reaches a failpoint.
 *
 *   node agent-process.ts ROOT SCENARIO FAILPOINT
 */
import { openCore } from "../index.ts";
import { SCENARIOS, type Stage } from "./scenarios.ts";
import { openSimulatedMachine } from "./simulated-machine.ts";

const [root, name, failpoint] = process.argv.slice(2);
const scenario = SCENARIOS.find((one) => one.name === name);
if (root === undefined || failpoint === undefined || scenario === undefined) {
  throw new Error("usage: agent-process.ts ROOT SCENARIO FAILPOINT");
}
const machine = openSimulatedMachine(root, { config: { retryIntervalMs: 3_600_000 } });
const stage: Stage = { machine, ...(await openCore(machine.deps)) };
await scenario.prepare(stage);
machine.deps.failpoints.arm(failpoint, "kill");
await scenario.act(stage);
// Came through: the test expects a SIGKILL, and says so.
process.exit(0);
