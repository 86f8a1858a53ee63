/**
 * The agent's core as a process of its own, to be killed: plays a scenario on
 * the machine in ROOT until it reaches a failpoint that is armed with "kill".
 *
 *   node agent-process.ts ROOT prepare SCENARIO [FAILPOINT]
 *   node agent-process.ts ROOT recover [FAILPOINT]
 */
import { openCore } from "../index.ts";
import { SCENARIOS, type Stage } from "./scenarios.ts";
import { openSimulatedMachine } from "./simulated-machine.ts";

const [root, task, ...rest] = process.argv.slice(2);
const [scenarioName, failpoint] = task === "prepare" ? rest : [undefined, ...rest];

const machine = openSimulatedMachine(root!, { seed: process.pid, config: { retryIntervalMs: 3_600_000 } });
if (task === "recover" && failpoint !== undefined) machine.deps.failpoints.arm(failpoint, "kill");
const stage: Stage = { machine, ...(await openCore(machine.deps)) };
if (task === "prepare") {
  const scenario = SCENARIOS.find(({ name }) => name === scenarioName);
  if (scenario === undefined) throw new Error(`no scenario ${scenarioName}`);
  await scenario.prepare(stage);
  if (failpoint !== undefined) machine.deps.failpoints.arm(failpoint, "kill");
  await scenario.act(stage);
}
// Came through: the test expects a SIGKILL, and says so.
process.exit(0);
