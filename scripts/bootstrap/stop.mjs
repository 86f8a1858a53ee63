/** `down`: everything that `up` started ends, sandboxes first, in the reverse order. */
import { existsSync } from "node:fs";
import { join } from "node:path";
import { agentCommand, agentEnv, serviceUid } from "./paths.mjs";
import { NODE_VERSION } from "./prepare.mjs";
import { livePid, stop } from "./processes.mjs";
import { say, step } from "./progress.mjs";
import { run } from "./run.mjs";

/** @param {ReturnType<typeof import("./paths.mjs").productPaths>} paths */
export async function stopProduct(paths) {
  const node = join(paths.toolchainDir, `node-${NODE_VERSION}`, "bin", "node");
  if (livePid(paths, "control-plane") !== undefined) {
    await step("stop the control plane", () => stop(paths, "control-plane", 15_000));
  }
  if (livePid(paths, "agent") !== undefined)
    await step("stop the host agent", () => stop(paths, "agent", 15_000));
  const agent = agentCommand(node);
  if (existsSync(agent[1]) && existsSync(paths.agentDataDir)) {
    await step("destroy sandboxes and what they held on this host", (note) =>
      run([...agent, "cleanup"], { note, env: agentEnv(paths, process.env) }),
    );
  }
  const database = join(paths.serviceDir, "control-plane", "postgres-main.mjs");
  if (existsSync(database)) {
    await step("stop the database", (note) =>
      run(
        [
          node,
          database,
          "stop",
          ...["--data-dir", paths.serviceDir],
          ...["--socket-dir", join(paths.runtimeDir, "pg")],
          ...["--pid-file", join(paths.runDir, "postgres.pid")],
          ...(serviceUid === undefined ? [] : ["--uid", String(serviceUid)]),
        ],
        { note },
      ),
    );
  }
  say("Rookery is down. Its data stay in " + paths.dataDir);
}
