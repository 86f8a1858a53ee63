/**
 * `npm run doctor`, `npm run image -- build|list`: the agent's host commands,
 * with the tools and the data directory that `up` uses.
 */
import { spawn } from "node:child_process";
import { once } from "node:events";
import { agentCommand, agentEnv, productPaths } from "./bootstrap/paths.mjs";
import { ensureBundles, prepareTools } from "./bootstrap/prepare.mjs";
import { say } from "./bootstrap/progress.mjs";
import { StepError } from "./bootstrap/run.mjs";

try {
  const paths = productPaths();
  const tools = await prepareTools(paths);
  await ensureBundles(paths, tools);
  const [program, ...args] = [...agentCommand(tools.node), ...process.argv.slice(2)];
  const child = spawn(program, args, { env: agentEnv(paths, tools.env), stdio: "inherit" });
  const [code] = await once(child, "exit");
  process.exitCode = code ?? 1;
} catch (cause) {
  if (!(cause instanceof StepError)) throw cause;
  say(`\n${cause.message}`);
  process.exitCode = 1;
}
