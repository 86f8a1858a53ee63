/**
 * `rookery-agent`: reads its environment, names the actions behind the
 * commands, and turns signals into an orderly end.
 */
import { mkdir } from "node:fs/promises";
import { resolve } from "node:path";
import { RookeryError } from "@rookery/protocol/errors";
import { run } from "@stricli/core";
import { pino } from "pino";
import type { Logger } from "pino";
import packageJson from "../package.json" with { type: "json" };
import { buildAgentApp } from "./cli/app.ts";
import type { Actions } from "./cli/app.ts";
import { printImageProgress, renderImages } from "./cli/output.ts";
import { readConfig } from "./config.ts";
import type { Config, ConfigFlags } from "./config.ts";
import { HostEnded } from "./control-plane/host-ending.ts";
import { diagnose } from "./doctor/doctor.ts";
import { hostProbes } from "./doctor/host-probes.ts";
import { renderDiagnosis } from "./doctor/render.ts";
import { driverProbes, openDrivers } from "./drivers.ts";
import { instanceTagOf } from "./guest-network/slots.ts";
import { removeTree } from "./host/atomic-file.ts";
import { removeCgroup } from "./host/cgroup.ts";
import { openImages } from "./machine.ts";
import { openAgent } from "./open-agent.ts";
import { serve } from "./serve.ts";

/** A probe starts a real guest, at worst on a busy host under emulation. */
const PROBE_TIMEOUT_MS = 60_000;
/** For an agent that is told to make room for `destroy-all`. */
const SEIZE_GRACE_MS = 15_000;

/** packages/host-agent, from src/ and from dist/ alike. */
const packageDir = resolve(import.meta.dirname, "..");
const config = (flags: ConfigFlags): Config => readConfig(process.env, flags, packageDir);
const out = (text: string): void => void process.stdout.write(text);
const color = process.stdout.isTTY && !process.env["NO_COLOR"];

const stop = new AbortController();
for (const signal of ["SIGTERM", "SIGINT"] as const) {
  process.once(signal, () => stop.abort(new RookeryError("unavailable", `stopped by ${signal}`)));
}

const actions: Actions = {
  async serve(flags) {
    const settings = config(flags);
    const logger = openLogger(settings, 1);
    process.on("warning", (err) => logger.warn({ err }, "warning"));
    // The log is written synchronously: an agent never dies without a word. VMs outlive it.
    const die = (err: unknown): never => {
      logger.fatal({ err }, "a fault of the agent's own: it ends");
      process.exit(1);
    };
    process.on("uncaughtException", die);
    process.on("unhandledRejection", die);
    await serve(settings, { logger, version: packageJson.version, stop: stop.signal });
  },

  async doctor({ data, json }) {
    const settings = config({ data });
    await mkdir(settings.dataDir, { recursive: true, mode: 0o700 });
    const tag = await instanceTagOf(settings.dataDir);
    const probes = [
      ...hostProbes({ dataDir: settings.dataDir, uid: process.getuid?.() }),
      ...driverProbes(await openDrivers(settings, tag)),
    ];
    const diagnosis = await diagnose(probes, { probeTimeoutMs: PROBE_TIMEOUT_MS, signal: stop.signal });
    out(json ? `${JSON.stringify(diagnosis)}\n` : renderDiagnosis(diagnosis, { color }));
    if (!diagnosis.ok) process.exitCode = 1;
  },

  async buildImage({ data, json }, name) {
    const settings = config({ data });
    const images = await openImages(settings, printImageProgress(json ? "json" : "text", out));
    const image = await images.ensure(name, stop.signal);
    out(json ? `${JSON.stringify({ type: "image", ...image })}\n` : `${image.name} ${image.hash}\n`);
  },

  async listImages({ data, json }) {
    const images = await (await openImages(config({ data }), () => undefined)).list();
    if (json) for (const image of images) out(`${JSON.stringify(image)}\n`);
    else out(renderImages(images));
  },

  async destroyAll({ data, json }) {
    // No pool: what it would start now would only have to be ended again.
    const settings = readConfig({ ...process.env, ROOKERY_POOL: "0" }, { data }, packageDir);
    const logger = openLogger(settings, 2);
    const failures = await destroyAll(settings, logger);
    if (json) out(`${JSON.stringify({ destroyed: failures.length === 0, failures })}\n`);
    else for (const { sandbox, message } of failures) out(`${sandbox}: ${message}\n`);
    if (failures.length > 0) process.exitCode = 1;
  },
};

async function destroyAll(settings: Config, logger: Logger): Promise<{ sandbox: string; message: string }[]> {
  const { signal } = stop;
  let failures;
  {
    const seize = { graceMs: SEIZE_GRACE_MS };
    await using agent = await openAgent({ config: settings, logger, seize, signal });
    failures = await agent.manager.destroyAll();
  }
  if (failures.length === 0) {
    // What all VMs shared, now that there is none; of every driver, since another one may be chosen today.
    const { network } = await openDrivers(settings, await instanceTagOf(settings.dataDir));
    for (const driver of network) await driver.restoreHost?.(signal);
    await removeCgroup(settings.cgroup, signal);
    await removeTree(settings.runtimeDir);
  }
  return failures.map(({ id, error }) => ({ sandbox: id, message: error.message }));
}

function openLogger(settings: Config, fd: 1 | 2): Logger {
  return pino({ level: settings.logLevel, base: {} }, pino.destination({ fd, sync: true }));
}

const app = buildAgentApp(actions, {
  version: packageJson.version,
  exitCodeOf: (error) => {
    if (error instanceof HostEnded) return 78;
    return error instanceof RookeryError && error.code === "invalid_token" ? 3 : 1;
  },
  wordsOf: (error) => {
    if (error instanceof RookeryError || error instanceof HostEnded) return `rookery-agent: ${error.message}`;
    return `rookery-agent: ${error instanceof Error ? (error.stack ?? error.message) : String(error)}`;
  },
});
await run(app, process.argv.slice(2), { process });
