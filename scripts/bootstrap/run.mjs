/** Child programs of the bootstrap: output is captured, shown on failure, and passed on line by line. */
import { spawn } from "node:child_process";

export class StepError extends Error {
  name = "StepError";
}

/**
 * @param {string[]} argv
 * @param {{cwd?: string, env?: NodeJS.ProcessEnv, note?: (text: string) => void, inherit?: boolean, timeoutMs?: number}} [options]
 * @returns {Promise<string>} its standard output
 */
export function run(argv, options = {}) {
  const [program, ...args] = argv;
  const { promise, resolve, reject } = Promise.withResolvers ? Promise.withResolvers() : withResolvers();
  const child = spawn(program, args, {
    cwd: options.cwd,
    env: options.env ?? process.env,
    stdio: options.inherit ? "inherit" : ["ignore", "pipe", "pipe"],
    timeout: options.timeoutMs,
  });
  let out = "";
  let tail = "";
  child.stdout?.setEncoding("utf8").on("data", (text) => {
    out += text;
    tail = (tail + text).slice(-4000);
    options.note?.(text);
  });
  child.stderr?.setEncoding("utf8").on("data", (text) => {
    tail = (tail + text).slice(-4000);
    options.note?.(text);
  });
  child.on("error", (cause) => reject(new StepError(`cannot start ${program}: ${cause.message}`)));
  child.on("close", (code, signal) => {
    if (code === 0) resolve(out);
    else
      reject(new StepError(`\`${argv.join(" ")}\` ended with ${signal ?? `code ${code}`}\n${tail.trim()}`));
  });
  return promise;
}

/** Node 20 has no Promise.withResolvers. */
function withResolvers() {
  const held = {};
  held.promise = new Promise((resolve, reject) => Object.assign(held, { resolve, reject }));
  return held;
}
