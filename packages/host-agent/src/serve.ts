/**
 * `rookery-agent serve`: the core, its RPC server, and its bond with the
 * control plane, until a signal ends it. VMs outlive it.
 */
import { randomBytes } from "node:crypto";
import { readFile, statfs } from "node:fs/promises";
import { arch, availableParallelism, freemem, loadavg, totalmem } from "node:os";
import { createSecureContext } from "node:tls";
import { RookeryError } from "@rookery/protocol/errors";
import type { Logger } from "pino";
import type { Config } from "./config.ts";
import { openCertificate } from "./control-plane/certificate.ts";
import { ControlPlaneClient } from "./control-plane/control-plane-client.ts";
import type { Heartbeat, HostDescription, Send } from "./control-plane/control-plane-client.ts";
import { ControlPlaneLink } from "./control-plane/control-plane-link.ts";
import { CredentialStore } from "./control-plane/credentials.ts";
import type { Credentials } from "./control-plane/credentials.ts";
import { HostEnded, HostEnding } from "./control-plane/host-ending.ts";
import { isNewRegistration, registerHost } from "./control-plane/register.ts";
import { openAgent } from "./open-agent.ts";
import type { Agent, World } from "./open-agent.ts";
import { startRpcServer } from "./rpc/server.ts";
import type { SandboxManager } from "./sandbox-manager/index.ts";
import { systemClock } from "./sandbox-manager/index.ts";

/** One exchange with the control plane; three of them fit into the shortest silence that counts. */
const EXCHANGE_TIMEOUT_MS = 10_000;

export interface ServeOptions {
  logger: Logger;
  version: string;
  stop: AbortSignal;
  world?: ServeWorld;
  /** Called once it serves and is registered. */
  onReady?: (serving: Serving) => void;
}

/** What a simulated run puts in the place of the world. */
export interface ServeWorld extends World {
  /** [0, 1): spreads heartbeats. */
  random?: () => number;
  /** Carries calls to the control plane. */
  send?: Send;
}

export interface Serving {
  hostId: string;
  address: { host: string; port: number };
  agent: Agent;
}

/**
 * Returns when `stop` aborts and what was under way has ended. Throws `HostEnded`
 * when the host was deleted, and its agent has nothing more to do.
 */
export async function serve(config: Config, options: ServeOptions): Promise<void> {
  const { logger, stop, world = {} } = options;
  const store = await CredentialStore.open(config.dataDir);
  const url = config.controlPlaneUrl ?? store.current?.controlPlaneUrl;
  const token = config.registrationToken;
  const isRegistered = store.current !== undefined || (url !== undefined && token !== undefined);
  if (!isRegistered && !store.isEnding) {
    throw new RookeryError(
      "invalid_request",
      "This host is not registered: start with --control-plane URL --register TOKEN",
    );
  }
  const ca =
    config.controlPlaneCaFile === undefined ? undefined : await readAuthorities(config.controlPlaneCaFile);
  await using agent = await openAgent({ config, logger, signal: stop, world });
  const ending = new HostEnding({
    store,
    destroyEverything: () => agent.manager.destroyEverything(),
    clock: world.clock ?? systemClock,
    logger,
    reach: (name) => agent.failpoints.reach(name),
  });
  if (store.isEnding) await ending.end(); // gone on with; then it may become another host
  if (!isRegistered || url === undefined) throw new HostEnded();
  await serveRegistered(agent, { ...options, config, store, url, ca, ending });
  if (ending.signal.aborted) {
    await ending.end();
    throw new HostEnded();
  }
  logger.info({}, "stopped; sandboxes stay");
}

interface Registered extends ServeOptions {
  config: Config;
  store: CredentialStore;
  url: string;
  /** PEM of the authorities that the control plane's certificate may come from. */
  ca: string | undefined;
  ending: HostEnding;
}

async function serveRegistered(agent: Agent, serving: Registered): Promise<void> {
  const { config, logger, store, url, ending, world = {} } = serving;
  const { clock = systemClock, random = Math.random } = world;
  const { manager, envd, failpoints } = agent;
  const certificate = config.tls
    ? await openCertificate(config.dataDir, { nowMs: () => systemClock.nowMs(), randomBytes })
    : undefined;
  const token = config.registrationToken;
  if (store.current !== undefined && (token === undefined || !isNewRegistration(store.current, token))) {
    requireRegistered(store.current, certificate?.fingerprint);
  }
  // The next start without the flag finds it there too.
  if (store.current !== undefined && store.current.controlPlaneUrl !== url) {
    await store.replace({ ...store.current, controlPlaneUrl: url });
  }
  await using client = new ControlPlaneClient(url, {
    timeoutMs: EXCHANGE_TIMEOUT_MS,
    ca: serving.ca,
    send: world.send,
  });
  const stop = AbortSignal.any([serving.stop, ending.signal]);

  // First the server: once registered, the control plane may call at any moment.
  const server = await startRpcServer({
    listen: config.listen,
    certificate: certificate?.pem,
    trust: () => store.current,
    operations: manager,
    envd,
    endHost: () => ending.end(),
    clock,
    logger,
  });
  try {
    const reach = (name: string): void | Promise<void> => failpoints.reach(name);
    const address = textOf({ ...config.address, port: config.address.port || server.address.port });
    if (token !== undefined) {
      const found = { address, certificateFingerprint: certificate?.fingerprint };
      const host = await describeHost(agent, config, { ...found, version: serving.version });
      try {
        await registerHost({ client, store, controlPlaneUrl: url, reach }, token, host, stop);
      } catch (err) {
        // Sandboxes that are here need their agent, and it has credentials that may be good.
        if (store.current === undefined || !isRefusal(err)) throw err;
        logger.error({ err }, "not registered anew: going on as the host that this was");
        requireRegistered(store.current, certificate?.fingerprint);
      }
    }
    const registeredAt = store.current?.address;
    if (registeredAt !== undefined && registeredAt !== address) {
      logger.error({ registeredAt, address }, "the control plane knows another address of this host");
    }
    logger.info({ ...server.address, hostId: store.current?.hostId, vmm: agent.vmm.kind }, "ready");
    const { hostId } = store.current ?? {};
    if (hostId !== undefined) serving.onReady?.({ hostId, address: server.address, agent });
    await new ControlPlaneLink({
      client,
      store,
      clock,
      logger,
      intervals: config.intervals,
      random,
      sandboxes: () => manager.outline(),
      load: (sandboxes) => readLoad(config.dataDir, sandboxes),
      snapshots: () => agent.snapshotSharing(),
      events: manager.events,
      pauseAll: () => pauseAll(manager, logger),
      endHost: () => ending.end(),
      reach,
    }).run(stop);
    if (!ending.signal.aborted) logger.info({}, "stopping: finishing what is under way");
  } finally {
    await server.close(config.intervals.stopGraceMs);
  }
}

function isRefusal(err: unknown): boolean {
  return err instanceof RookeryError && err.code === "invalid_token";
}

/** An agent whose calls nobody can make would look alive: better that it does not start. VMs go on meanwhile. */
function requireRegistered(current: Credentials, fingerprint: string | undefined): void {
  if (current.certificateFingerprint === fingerprint) return;
  throw new RookeryError(
    "invalid_request",
    current.certificateFingerprint === undefined || fingerprint === undefined
      ? "This host registered with another kind of address (with TLS, or on loopback without): use that one, or register it again with --register TOKEN"
      : "certificate.pem in the data directory is not the one that this host registered with: put that one back, or register the host again with --register TOKEN",
  );
}

/** Throws `invalid_request`: without them nobody could be trusted. */
async function readAuthorities(path: string): Promise<string> {
  try {
    const pem = await readFile(path, "utf8");
    createSecureContext({ ca: pem });
    if (!pem.includes("-----BEGIN CERTIFICATE-----")) throw new Error("there is no certificate in it");
    return pem;
  } catch (cause) {
    throw new RookeryError(
      "invalid_request",
      `ROOKERY_CONTROL_PLANE_CA: ${path} can't be used: ${String(cause)}`,
      {
        cause,
      },
    );
  }
}

function textOf({ host, port }: { host: string; port: number }): string {
  return `${host.includes(":") ? `[${host}]` : host}:${port}`;
}

async function describeHost(
  { vmm, vmmProbe, rootDisk, network }: Agent,
  config: Config,
  found: Pick<HostDescription, "address" | "certificateFingerprint" | "version">,
): Promise<Omit<HostDescription, "publicKey">> {
  const { blocks, bsize } = await statfs(config.dataDir);
  return {
    ...found,
    arch: arch(),
    cpus: availableParallelism(),
    memoryMb: Math.floor(totalmem() / (1 << 20)),
    diskMb: Math.floor((blocks * bsize) / (1 << 20)),
    drivers: {
      vmm: vmm.kind,
      acceleration: vmmProbe.acceleration ?? "unknown",
      root_disk: rootDisk.kind,
      network: network.kind,
    },
  };
}

async function readLoad(dataDir: string, sandboxes: number): Promise<Heartbeat["load"]> {
  const { bavail, bsize } = await statfs(dataDir);
  return {
    cpus: loadavg()[0] ?? 0,
    memoryMbUsed: Math.floor((totalmem() - freemem()) / (1 << 20)),
    diskMbFree: Math.floor((bavail * bsize) / (1 << 20)),
    sandboxes,
  };
}

async function pauseAll(manager: SandboxManager, logger: Logger): Promise<void> {
  const { paused, frozen, failures } = await manager.pauseAll({
    reason: "control_plane_lost",
    message: "the host lost its control plane",
  });
  if (paused.length + frozen.length > 0) {
    logger.info({ paused: paused.length, frozen: frozen.length }, "paused what ran");
  }
  if (frozen.length > 0) logger.error({ frozen }, "no room on the disk: these are stopped in memory alone");
  for (const { id, error } of failures) logger.error({ sandbox: id, err: error }, "could not be paused");
}
