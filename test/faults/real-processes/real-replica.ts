/** One replica: the real control plane program, in its own network namespace, as the uid that `up` gives it. */
import { execFile } from "node:child_process";
import { promisify } from "node:util";
import { Program } from "./program.ts";
import { API_PORT, CONTROL_PLANE_TIMES, SECRET_KEY, SERVICE_UID, paced } from "./settings.ts";
import type { Node } from "./topology.ts";

const exec = promisify(execFile);
const RESTART_MS = 100;

export interface RealReplica extends AsyncDisposable {
  node: Node;
  program: Program;
  /** Another command of the control plane; gives back what it printed. */
  command(...args: string[]): Promise<unknown>;
}

export function openReplica(options: {
  node: Node;
  logDir: string;
  workshop: { node: string; controlPlane: string };
  databaseUrl: string;
  pace: number;
}): RealReplica {
  const { node, logDir, workshop, databaseUrl, pace } = options;
  const uid = String(SERVICE_UID);
  const asUid = ["setpriv", "--reuid", uid, "--regid", uid, "--clear-groups", "--no-new-privs", "--"];
  const command = (...args: string[]) => [...asUid, workshop.node, workshop.controlPlane, ...args];
  const env = {
    DATABASE_URL: databaseUrl,
    ROOKERY_SECRET_KEY: SECRET_KEY,
    ROOKERY_HOST: node.address,
    ROOKERY_PORT: String(API_PORT),
    ROOKERY_REQUESTS_PER_MINUTE: "0",
    ROOKERY_DATABASE_CONNECTIONS: "8",
    ROOKERY_LOG_LEVEL: "info",
    ...paced(CONTROL_PLANE_TIMES, pace),
  };
  const program = new Program({
    name: node.name,
    namespace: node.namespace,
    logDir,
    ready: "Server listening",
    restartMs: RESTART_MS * pace,
    command: () => command("serve"),
    env: () => env,
  });
  return {
    node,
    program,
    async command(...args) {
      const argv = [`--net=${node.namespace}`, ...command(...args)];
      const { stdout } = await exec("nsenter", argv, {
        cwd: "/",
        env: { PATH: process.env["PATH"], ...env },
      });
      return JSON.parse(stdout.trim().split("\n").at(-1) ?? "");
    },
    [Symbol.asyncDispose]: () => program.end(),
  };
}
