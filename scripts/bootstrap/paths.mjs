/**
 * Where the product of this clone keeps things.
 *
 * Invariant: two data directories never share a file, a socket or a database.
 * What is the clone's alone (Node 24, bundles) lies in `.rookery/` of the clone;
 * all else lies in the data directory, whose tag marks what must live elsewhere:
 * sockets (their paths end at 107 bytes) and what the unprivileged uid runs.
 */
import { createHash } from "node:crypto";
import { mkdirSync } from "node:fs";
import { join, resolve } from "node:path";
import { fileURLToPath } from "node:url";

export const repoDir = resolve(fileURLToPath(new URL("../..", import.meta.url)));
export const isRoot = process.getuid?.() === 0;
/** Runs the database and the control plane when `up` is root; it owns nothing else on the machine. */
export const serviceUid = isRoot ? 64750 : undefined;

/** @param {NodeJS.ProcessEnv} env */
export function productPaths(env = process.env) {
  const dataDir = resolve(env.ROOKERY_DATA ?? join(repoDir, ".rookery"));
  const tag = createHash("sha256").update(dataDir).digest("hex").slice(0, 8);
  const runtimeDir = isRoot
    ? `/run/rookery-${tag}`
    : join(env.XDG_RUNTIME_DIR ?? "/tmp", `rookery-${process.getuid?.() ?? 0}-${tag}`);
  const paths = {
    dataDir,
    tag,
    runtimeDir,
    /** Where a uid that may not enter the clone finds its programs and data. */
    serviceDir: isRoot ? `/var/lib/rookery-${tag}` : join(dataDir, "service"),
    runDir: join(dataDir, "run"),
    logDir: join(dataDir, "logs"),
    agentDataDir: join(dataDir, "agent"),
    credentialsFile: join(dataDir, "credentials.json"),
    secretsFile: join(dataDir, "secrets.json"),
    toolchainDir: join(repoDir, ".rookery", "toolchain"),
    stampDir: join(repoDir, ".rookery", "stamps"),
  };
  for (const dir of [paths.dataDir, paths.runDir, paths.logDir, paths.toolchainDir, paths.stampDir]) {
    mkdirSync(dir, { recursive: true, mode: 0o700 });
  }
  return paths;
}

/** The command line of the agent: its name stands in no other process's. */
export function agentCommand(node) {
  return [node, join(repoDir, "packages", "host-agent", "dist", "rookery-agent.mjs")];
}

/** @param {ReturnType<typeof productPaths>} paths */
export function agentEnv(paths, env) {
  return {
    ...env,
    ROOKERY_AGENT_DATA: paths.agentDataDir,
    ROOKERY_RUNTIME_DIR: join(paths.runtimeDir, "agent"),
  };
}
