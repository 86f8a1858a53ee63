/**
 * One host: the real agent program in its own network namespace, on a disk of
 * its own that can get full, with a wall clock that can be off. Its VMs are
 * files on that disk and outlive the agent.
 */
import { createHash } from "node:crypto";
import {
  closeSync,
  mkdirSync,
  openSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { join } from "node:path";
import { openHostClient } from "../../../packages/control-plane/src/hosts/host-client.ts";
import { commandTokens } from "../../../packages/control-plane/src/hosts/tokens.ts";
import type { Cluster } from "../../../packages/control-plane/src/hosts/cluster.ts";
import { isHostId } from "../../../packages/control-plane/src/model/ids.ts";
import { FAILPOINTS } from "../../../packages/host-agent/src/sandbox-manager/index.ts";
import type { Random } from "../random.ts";
import type { MachineFacts } from "../world.ts";
import { run } from "./enclosure.ts";
import { readFacts, readProcesses } from "./machine-facts.ts";
import { Program } from "./program.ts";
import { AGENT_PORT, AGENT_SETTINGS, AGENT_TIMES, FRONT_DOOR_PORT, paced } from "./settings.ts";
import type { Node } from "./topology.ts";

/** What it registers with, since sandboxes ask for so much; no memory stands behind it. */
const DISK_SIZE = "16g";
/** What it really has, so that it can be filled. */
const SMALL_DISK_SIZE = "24m";
const FILL_AGAIN_MS = 25;
const LOOK = { answerGraceMs: 5_000, lookMs: 10_000, connectTimeoutMs: 5_000 };
const PINGS = { pingIntervalMs: 20_000, pingTimeoutMs: 10_000 };
const RESTART_MS = 100;

export interface RealHostOptions {
  node: Node;
  dir: string;
  logDir: string;
  agentProgram: string;
  /** Where agents find the control plane, and who vouches for it. */
  center: string;
  authorityFile: string;
  cluster: Cluster;
  random: Random;
  pace: number;
}

export class RealHost implements AsyncDisposable {
  readonly #options: RealHostOptions;
  readonly #dataDir: string;
  readonly program: Program;
  readonly #tokens: ReturnType<typeof commandTokens>;
  #registrationToken: string | undefined;
  #reboots = 0;
  #filling: NodeJS.Timeout | undefined;
  hostId = "";

  constructor(options: RealHostOptions) {
    const { node, dir, logDir, random, pace } = options;
    this.#options = options;
    mkdirSync(dir);
    run("mount", "-t", "tmpfs", "-o", `mode=700,size=${DISK_SIZE}`, `rookery-faults-${node.name}`, dir);
    this.#dataDir = join(dir, "data");
    mkdirSync(join(this.#dataDir, "simulated"), { recursive: true });
    // A record for tests that grows with each step: none of the host's own.
    symlinkSync(join(logDir, `${node.name}.hits`), join(this.#dataDir, "failpoint-hits"));
    this.#tokens = commandTokens(options.cluster, () => Date.now());
    // Half of the hosts meet the end of the disk itself, the others the reserve before it.
    const reserveMb = random.pick(["0", "2"]);
    const seeds = random.fork();
    this.program = new Program({
      name: node.name,
      namespace: node.namespace,
      logDir,
      ready: '"msg":"ready"',
      restartMs: RESTART_MS * pace,
      command: () => this.#command(),
      env: () => ({
        ...AGENT_SETTINGS,
        ...paced(AGENT_TIMES, pace),
        ROOKERY_AGENT_DATA: this.#dataDir,
        ROOKERY_AGENT_ADDRESS: `${node.address}:${AGENT_PORT}`,
        ROOKERY_CONTROL_PLANE: `https://${options.center}:${FRONT_DOOR_PORT}`,
        ROOKERY_CONTROL_PLANE_CA: options.authorityFile,
        ROOKERY_DISK_RESERVE_MB: reserveMb,
        ROOKERY_SIMULATED_SEED: String(seeds.between(1, 2 ** 31)),
        ROOKERY_FAULTS_CLOCK: this.#clockFile,
        ROOKERY_LOG_LEVEL: "info",
      }),
    });
  }

  get node(): Node {
    return this.#options.node;
  }

  /** From its next start on, until it is registered. */
  registerWith(token: string): void {
    this.#registrationToken = token;
  }

  /** Its credentials came from that token. */
  get isRegistered(): boolean {
    try {
      const credentials: unknown = JSON.parse(readFileSync(join(this.#dataDir, "credentials.json"), "utf8"));
      const { registeredWith } = credentials as { registeredWith: string };
      return (
        registeredWith ===
        createHash("sha256")
          .update(this.#registrationToken ?? "")
          .digest("hex")
      );
    } catch {
      return false; // not yet
    }
  }

  /** It is registered: no token any more, and no more disk than can be filled. */
  endRegistration(): void {
    this.#registrationToken = undefined;
    run("mount", "-o", `remount,size=${SMALL_DISK_SIZE}`, this.#options.dir);
  }

  /** What lived in the machine's memory goes; to be called while the agent is down. */
  endAllVms(): void {
    this.#reboots += 1;
    for (const { pid } of readProcesses(this.#dataDir)) this.#removeProcess(pid);
    // A full disk takes no new text.
    unlessFull(() => writeFileSync(this.#bootFile, `boot-${this.#reboots}`));
  }

  /** The sandbox of a guest that runs, to be told to panic; while the agent is down, it is gone at once. */
  crashGuest(choice: number): string | undefined {
    const running = readProcesses(this.#dataDir).filter(({ state }) => state === "running");
    const victim = running[Math.floor(choice * running.length)];
    if (victim === undefined) return undefined;
    if (this.program.pid !== undefined) return victim.guest.memory["sandboxId"];
    this.#removeProcess(victim.pid);
    return undefined;
  }

  /** Lets a step fail, or the agent kill itself there. */
  arm(choices: readonly number[], action: "error" | "kill", times: number): void {
    const names = choices.map((choice) => FAILPOINTS[Math.floor(choice * FAILPOINTS.length)]!);
    const control = Object.fromEntries(names.map((name) => [name, `${action}*${times}`]));
    // Where the disk is full, it is trouble enough.
    unlessFull(() => writeFileSync(this.#failpointFile, JSON.stringify(control)));
  }

  disarm(): void {
    rmSync(this.#failpointFile, { force: true });
  }

  setClock(skewMs: number): void {
    writeFileSync(this.#clockFile, String(skewMs));
  }

  /** Not a byte is left, whatever the agent frees meanwhile. */
  fillDisk(): void {
    clearInterval(this.#filling);
    const fill = (): void => {
      const file = openSync(this.#ballast, "a");
      try {
        for (const bytes of [1 << 20, 1 << 16, 1 << 12]) {
          const block = Buffer.alloc(bytes);
          unlessFull(() => {
            while (writeSync(file, block) === bytes);
          });
        }
      } finally {
        closeSync(file);
      }
    };
    this.#filling = setInterval(fill, FILL_AGAIN_MS);
    fill();
  }

  emptyDisk(): void {
    clearInterval(this.#filling);
    rmSync(this.#ballast, { force: true });
  }

  async facts(): Promise<MachineFacts> {
    const { hostId } = this;
    const { pid } = this.program;
    if (pid === undefined || !isHostId(hostId)) return unknownFacts(hostId, "the agent does not run");
    const { node, cluster } = this.#options;
    const client = openHostClient(
      {
        id: hostId,
        address: `${node.address}:${AGENT_PORT}`,
        certificateFingerprint: this.#fingerprint(),
        epoch: 0,
      },
      { ...LOOK, ...PINGS, clusterId: cluster.id, now: () => Date.now(), token: (id) => this.#tokens(id) },
    );
    try {
      return await readFacts({
        hostId,
        pid,
        dataDir: this.#dataDir,
        namespace: node.namespace,
        agent: client.agent,
      });
    } catch (cause) {
      return unknownFacts(hostId, `the machine can't be read: ${String(cause)}`);
    } finally {
      client.close();
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.emptyDisk();
    await this.program.end();
    run("umount", this.#options.dir);
  }

  #command(): string[] {
    const token = this.#registrationToken;
    const register = token === undefined ? [] : ["--register", token];
    const skew = join(import.meta.dirname, "clock-skew.mjs");
    return [process.execPath, "--import", skew, this.#options.agentProgram, "serve", ...register];
  }

  #fingerprint(): string {
    const credentials: unknown = JSON.parse(readFileSync(join(this.#dataDir, "credentials.json"), "utf8"));
    return (credentials as { certificateFingerprint: string }).certificateFingerprint;
  }

  #removeProcess(pid: number): void {
    rmSync(join(this.#dataDir, "simulated", "processes", `${pid}.json`), { force: true });
  }

  get #clockFile(): string {
    return join(this.#options.logDir, `${this.node.name}.clock`);
  }
  get #bootFile(): string {
    return join(this.#dataDir, "simulated", "boot-id");
  }
  get #failpointFile(): string {
    return join(this.#dataDir, "failpoints.json");
  }
  get #ballast(): string {
    return join(this.#options.dir, "ballast");
  }
}

function unknownFacts(hostId: string, why: string): MachineFacts {
  return {
    hostId,
    isUp: false,
    sandboxes: [],
    vms: [],
    snapshots: [],
    leaks: [why],
    eventLogId: "",
    lastEvent: 0n,
  };
}

function unlessFull(work: () => void): void {
  try {
    work();
  } catch (cause) {
    if (!(cause instanceof Error && "code" in cause && cause.code === "ENOSPC")) throw cause;
  }
}
