/** Entry of `rookery`; bin/rookery.mjs starts it under the right Node. */
import { spawn } from "node:child_process";
import { once } from "node:events";
import { join } from "node:path";
import { run } from "@stricli/core";
import packageJson from "../package.json" with { type: "json" };
import { buildRookeryApp } from "./app.ts";

const scriptsDir = join(import.meta.dirname, "..", "..", "..", "scripts");

async function runScript(script: string, args: readonly string[]): Promise<number> {
  const child = spawn(process.execPath, [join(scriptsDir, script), ...args], { stdio: "inherit" });
  const ended = once(child, "exit");
  // Ctrl-C reaches the script from the terminal, and SIGTERM from here; we end when it does.
  process.on("SIGINT", () => undefined);
  process.on("SIGTERM", () => child.kill("SIGTERM"));
  const [code]: unknown[] = await ended;
  return typeof code === "number" ? code : 1;
}

const app = buildRookeryApp(runScript, {
  version: packageJson.version,
  exit: (code) => {
    process.exitCode = code;
  },
});
await run(app, process.argv.slice(2), { process });
