#!/usr/bin/env node
/**
 * `rookery`, on whatever Node the machine has: gets the Node and the packages
 * that the product needs, then hands over to src/main.ts.
 */
import { spawn } from "node:child_process";
import { once } from "node:events";
import { join } from "node:path";
import { productPaths, repoDir } from "../../../scripts/bootstrap/paths.mjs";
import { prepareTools } from "../../../scripts/bootstrap/prepare.mjs";
import { StepError } from "../../../scripts/bootstrap/run.mjs";

try {
  const { node, env } = await prepareTools(productPaths());
  const main = join(repoDir, "packages", "cli", "src", "main.ts");
  const child = spawn(node, [main, ...process.argv.slice(2)], { env, stdio: "inherit" });
  // Ctrl-C goes to both; the child decides what becomes of it.
  process.on("SIGINT", () => undefined);
  process.on("SIGTERM", () => child.kill("SIGTERM"));
  const [code] = await once(child, "exit");
  process.exitCode = code ?? 1;
} catch (cause) {
  if (!(cause instanceof StepError)) throw cause;
  console.error(cause.message);
  process.exitCode = 1;
}
