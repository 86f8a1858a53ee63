/**
 * The fleet as real processes: agents and replicas are the product's programs,
 * each in a network namespace of its own, on a PostgreSQL server of the run's.
 * Callers and the front door are this process.
 */
import { mkdirSync, readFileSync, rmSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { z } from "zod";
import type { Log } from "../in-process/log.ts";
import type { Random } from "../random.ts";
import type { Fault, Schedule } from "../schedule.ts";
import { type ApiAnswer, type ApiRequest, NoAnswer, type Observed, type World } from "../world.ts";
import { type DatabaseTemplate, DatabaseServer } from "./database-server.ts";
import { Filters } from "./filters.ts";
import { type Authority, FrontDoor } from "./front-door.ts";
import { type HostFault, beginHostFault } from "./host-faults.ts";
import { httpCall } from "./http-call.ts";
import { type Path, callerPaths, databasePaths, hostPaths } from "./paths.ts";
import { RealHost } from "./real-host.ts";
import { type RealReplica, openReplica } from "./real-replica.ts";
import { API_PORT } from "./settings.ts";
import { type Topology, makeTopology, removeTopology } from "./topology.ts";

/** What all runs of one enclosure share. */
export interface Workshop {
  root: string;
  /** Programs as they are started. */
  node: string;
  agentProgram: string;
  controlPlane: string;
  template: DatabaseTemplate;
  authority: Authority;
}

export interface RealWorldOptions {
  schedule: Schedule;
  random: Random;
  log: Log;
  workshop: Workshop;
  /** Runs side by side differ by it. */
  slot: number;
}

const CALLER_PATIENCE_MS = 8_000;
const FRONT_DOOR_PATIENCE_MS = 1_600;
const START_LIMIT_MS = 120_000;
const LOOK_AGAIN_MS = 250;
const REGISTRATION_LIMIT_MS = 20_000;
const DATABASE_CUT_MS = 20;
/** The theft shows when the host next renews its token, if it was one that still counted. */
const THEFT_SHOWS_MS = 3_000;

const madeHost = z.object({ host: z.object({ id: z.string() }), registration_token: z.string() });
const madeSandbox = z.object({ id: z.string() });
const hostStatus = z.object({ status: z.string() });
const bootstrapped = z.object({ api_key: z.string() });

export class RealWorld implements World {
  readonly #options: RealWorldOptions;
  readonly #random: Random;
  readonly #pace: number;
  readonly #topology: Topology;
  readonly #filters: Filters;
  readonly #hosts: RealHost[];
  readonly #replicas: RealReplica[];
  readonly #database: DatabaseServer;
  readonly #door: FrontDoor;
  readonly #robbed = new Set<number>();
  /** Faults that end by themselves; each ends what it began. */
  readonly #underWay = new Set<Promise<void>>();
  readonly #healing = new AbortController();
  readonly faults: Record<string, number> = {};
  readonly #resources: AsyncDisposableStack;
  readonly #beganAtMs = Date.now();
  #apiKey = "";

  private constructor(
    options: RealWorldOptions,
    parts: {
      topology: Topology;
      filters: Filters;
      database: DatabaseServer;
      door: FrontDoor;
      hosts: RealHost[];
      replicas: RealReplica[];
      resources: AsyncDisposableStack;
    },
  ) {
    this.#options = options;
    this.#random = options.random.fork();
    this.#pace = options.schedule.pace;
    this.#topology = parts.topology;
    this.#filters = parts.filters;
    this.#database = parts.database;
    this.#door = parts.door;
    this.#hosts = parts.hosts;
    this.#replicas = parts.replicas;
    this.#resources = parts.resources;
  }

  /** Up, with every host registered and online. */
  static async open(options: RealWorldOptions): Promise<RealWorld> {
    const { schedule, random, workshop, slot } = options;
    const { pace } = schedule;
    const dir = join(workshop.root, `run${slot}`);
    const logDir = join(dir, "logs");
    await using stack = new AsyncDisposableStack();
    mkdirSync(dir);
    stack.defer(() => rmSync(dir, { recursive: true, force: true }));
    mkdirSync(logDir);
    mkdirSync(join(dir, "database"));
    const topology = makeTopology(dir, { slot, hosts: schedule.hosts, replicas: schedule.replicas });
    stack.defer(() => removeTopology(topology));
    const filters = stack.use(new Filters(slot));
    const database = stack.use(
      await DatabaseServer.start(workshop.template, join(dir, "database"), topology.center),
    );
    const door = stack.use(
      await FrontDoor.open(topology, {
        random: random.fork(),
        authority: workshop.authority,
        patienceMs: FRONT_DOOR_PATIENCE_MS * pace,
      }),
    );
    const replicas = topology.replicas.map((node) =>
      stack.use(openReplica({ node, logDir, workshop, databaseUrl: database.url, pace })),
    );
    const hosts = topology.hosts.map((node) =>
      stack.use(
        new RealHost({
          node,
          dir: join(dir, node.name),
          logDir,
          agentProgram: workshop.agentProgram,
          center: topology.center,
          authorityFile: workshop.authority.certFile,
          cluster: workshop.template.cluster,
          random: random.fork(),
          pace,
        }),
      ),
    );
    const parts = { dir, topology, filters, database, door, hosts, replicas };
    const world = new RealWorld(options, { ...parts, resources: stack.move() });
    try {
      await world.#begin();
      return world;
    } catch (cause) {
      await world[Symbol.asyncDispose]();
      throw cause;
    }
  }

  get doubleCredentials(): readonly string[] {
    return this.#door.credentials.violations;
  }

  /** Seen in the form in one process alone: from outside a program, a command that did nothing looks like none. */
  get staleCommands(): readonly string[] {
    return [];
  }

  get brokenPrograms(): readonly string[] {
    return [...this.#hosts, ...this.#replicas].flatMap(({ program }) => program.breakdowns);
  }

  async #begin(): Promise<void> {
    for (const { program } of this.#replicas) program.start();
    const { api_key: key } = bootstrapped.parse(await this.#replicas[0]!.command("bootstrap", "--new-key"));
    this.#apiKey = key;
    await this.#until("the replicas are up", async () => {
      const ready = await Promise.all(this.#replicas.keys().map((index) => this.#isReady(index)));
      return ready.every(Boolean);
    });
    await Promise.all(
      this.#hosts.map(async (host, index) => {
        const body = { name: host.node.name, type: "shared" };
        const { host: made, registration_token: token } = madeHost.parse(
          (await this.#must(201, { method: "POST", path: "/v1/hosts", body })).body,
        );
        host.hostId = made.id;
        host.registerWith(token);
        host.program.start();
        await this.#until(`host ${index} is online`, async () => (await this.#statusOf(host)) === "online");
        host.endRegistration();
      }),
    );
    await this.#warmUp();
  }

  /** Each host's first sandbox boots its warm image, which takes longer than a run has. */
  async #warmUp(): Promise<void> {
    const made = this.#hosts.map(async () => {
      const { body } = await this.call(0, {
        method: "POST",
        path: "/v1/sandboxes",
        body: { timeout_sec: 0 },
      });
      const { id } = madeSandbox.parse(body);
      await this.#must(204, { method: "DELETE", path: `/v1/sandboxes/${id}` });
    });
    // Where the machine is too busy for that, the run's own creates find it half done.
    await Promise.allSettled(made);
  }

  async call(replica: number, request: ApiRequest): Promise<ApiAnswer> {
    return await this.#send(replica, request, { "x-api-key": this.#apiKey });
  }

  async inject(fault: Fault): Promise<void> {
    this.faults[fault.kind] = (this.faults[fault.kind] ?? 0) + 1;
    this.#options.log.note(fault, "fault");
    switch (fault.kind) {
      case "cut":
        return this.#during(
          this.#filters.begin(
            { kind: "cut", paths: hostPaths(this.#topology, fault) },
            this.#paced(fault.ms),
          ),
        );
      case "silence": {
        // Half-open links are the harder ones: one side goes on to believe in the other.
        const lost = this.#random.pick(["requests", "answers", "both"] as const);
        const silence = { kind: "silence", paths: hostPaths(this.#topology, fault), lost } as const;
        return this.#during(this.#filters.begin(silence, this.#paced(fault.ms)));
      }
      case "loss": {
        const paths = hostPaths(this.#topology, { host: fault.host, direction: "both" });
        const ms = this.#paced(fault.ms);
        this.#during(this.#filters.begin({ kind: "loss", paths, share: fault.share }, ms));
        if (fault.delayMs > 0) {
          this.#during(
            this.#filters.slowDown(this.#topology.hosts[fault.host]!, this.#paced(fault.delayMs), ms),
          );
        }
        return undefined;
      }
      case "caller-loss": {
        const paths = callerPaths(this.#topology);
        return this.#during(
          this.#filters.begin({ kind: "loss", paths, share: fault.share }, this.#paced(fault.ms)),
        );
      }
      case "replica-crash":
        return this.#during(this.#replicas[fault.replica]!.program.crash(this.#paced(fault.downMs)));
      case "replica-stall":
        return this.#during(this.#replicas[fault.replica]!.program.stall(this.#paced(fault.ms)));
      case "database-outage":
        return this.#during(this.#loseDatabase(this.#paced(fault.ms)));
      case "database-cut":
        return this.#during(this.#cutDatabase());
      default:
        return this.#injectHost(fault, this.#hosts[fault.host]!);
    }
  }

  #injectHost(
    fault: HostFault | Extract<Fault, { kind: "guest-crash" | "stolen-token" }>,
    host: RealHost,
  ): void {
    if (fault.kind === "guest-crash") return this.#crashGuest(host, fault.guest);
    if (fault.kind === "stolen-token") return this.#during(this.#steal(fault.host));
    return beginHostFault(fault, host, {
      random: this.#random,
      paced: (ms) => this.#paced(ms),
      pass: (ms) => this.#pass(ms),
      isHealing: () => this.#healing.signal.aborted,
      during: (work) => this.#during(work),
    });
  }

  async heal(): Promise<void> {
    this.#healing.abort();
    await this.#filters.heal();
    for (const host of this.#hosts) {
      host.program.forgetNextEnd();
      host.setClock(0);
      host.emptyDisk();
      host.disarm();
    }
    for (const { program } of [...this.#hosts, ...this.#replicas]) program.goOn();
    while (this.#underWay.size > 0) await Promise.all(this.#underWay);
    await this.#database.settled();
    await this.#until("all programs run", async () => {
      const ready = await Promise.all(this.#replicas.keys().map((index) => this.#isReady(index)));
      return (
        ready.every(Boolean) &&
        this.#hosts.every(({ program }) => program.isMeantToRun && program.pid !== undefined)
      );
    });
    await Promise.all([...this.#robbed].map((index) => this.#registerAnew(this.#hosts[index]!)));
  }

  async observe(): Promise<Observed> {
    // The database first: what a machine says must not be older than what rows say of it.
    const seen = await this.#database.observe();
    return { ...seen, machines: await Promise.all(this.#hosts.map((host) => host.facts())) };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#healing.abort();
    await Promise.allSettled(this.#underWay);
    const programs = [...this.#hosts, ...this.#replicas].map(({ program }) => program);
    await Promise.all(programs.map((program) => program.end()));
    for (const { who, path } of programs.flatMap(({ logFiles }) => logFiles)) {
      this.#options.log.takeFile(who, readFileSync(path, "utf8"), this.#beganAtMs);
    }
    await this.#resources.disposeAsync();
  }

  /** Until the fault is over; the schedule goes on meanwhile. */
  #during(work: Promise<void>): void {
    const done = work
      .catch((cause: unknown) => this.#options.log.note({ err: cause }, "a fault could not be made"))
      .finally(() => this.#underWay.delete(done));
    this.#underWay.add(done);
  }

  /** Shorter when all is to be healed. */
  async #pass(ms: number): Promise<void> {
    await sleep(ms, undefined, { signal: this.#healing.signal }).catch(() => undefined);
  }

  #paced(ms: number): number {
    return ms * this.#pace;
  }

  /** Of all replicas, or of one alone. */
  #databasePaths(): Path[] {
    const { replicas } = this.#topology;
    return databasePaths(this.#topology, this.#random.chance(0.5) ? replicas : [this.#random.pick(replicas)]);
  }

  async #loseDatabase(ms: number): Promise<void> {
    const how = this.#random.pick(["in-order", "by-force", "stall", "silence"] as const);
    this.#options.log.note({ how }, "the database goes away");
    if (how === "stall") await this.#database.stall(ms);
    else if (how !== "silence") await this.#database.restart(how, ms);
    else await this.#filters.begin({ kind: "silence", paths: this.#databasePaths(), lost: "both" }, ms);
  }

  async #cutDatabase(): Promise<void> {
    if (this.#random.chance(0.5)) await this.#database.breakConnections();
    else
      await this.#filters.begin({ kind: "cut", paths: this.#databasePaths() }, this.#paced(DATABASE_CUT_MS));
  }

  #crashGuest(host: RealHost, choice: number): void {
    const id = host.crashGuest(choice);
    if (id === undefined) return;
    const replica = this.#random.between(0, this.#replicas.length - 1);
    const request = { method: "POST", path: `/v1/sandboxes/${id}/exec`, body: { cmd: "panic" } } as const;
    // Whether it is told so, or not: its guest is gone, or was not reached.
    this.#during(
      this.call(replica, request).then(
        () => undefined,
        () => undefined,
      ),
    );
  }

  /** A thief shows a token that the host has, or had. */
  async #steal(index: number): Promise<void> {
    const token = this.#door.refreshTokens[index]!.at(this.#random.chance(0.5) ? -1 : -2);
    if (token === undefined) return;
    this.#robbed.add(index);
    const replica = this.#random.between(0, this.#replicas.length - 1);
    const request = {
      method: "POST",
      path: "/v1/hosts/auth/refresh",
      body: { refresh_token: token },
    } as const;
    await this.#door.credentials
      .refresh(token, () => this.#send(replica, request, {}))
      .catch((cause: unknown) => {
        if (!(cause instanceof NoAnswer)) throw cause;
      });
  }

  /** For a host that was cut off because one of its tokens was stolen; as an operator does it. */
  async #registerAnew(host: RealHost): Promise<void> {
    await sleep(this.#paced(THEFT_SHOWS_MS));
    while ((await this.#statusOf(host)) !== "online") {
      const path = `/v1/hosts/${host.hostId}/token`;
      const { registration_token: token } = madeHost.parse(
        (await this.call(0, { method: "POST", path })).body,
      );
      host.registerWith(token);
      await host.program.crash(0);
      const giveUpAt = performance.now() + this.#paced(REGISTRATION_LIMIT_MS);
      while (!host.isRegistered && performance.now() < giveUpAt) await sleep(50);
      while ((await this.#statusOf(host)) !== "online" && performance.now() < giveUpAt)
        await sleep(LOOK_AGAIN_MS);
      host.endRegistration();
    }
  }

  async #statusOf(host: RealHost): Promise<string> {
    const { body } = await this.#must(200, { method: "GET", path: `/v1/hosts/${host.hostId}` });
    return hostStatus.parse(body).status;
  }

  async #isReady(replica: number): Promise<boolean> {
    try {
      return (await this.#send(replica, { method: "GET", path: "/readyz" }, {})).status === 200;
    } catch (cause) {
      if (cause instanceof NoAnswer) return false;
      throw cause;
    }
  }

  async #must(status: number, request: ApiRequest): Promise<ApiAnswer> {
    const answer = await this.call(0, request);
    if (answer.status !== status) throw new Error(`${request.path}: ${JSON.stringify(answer)}`);
    return answer;
  }

  async #send(replica: number, request: ApiRequest, headers: Record<string, string>): Promise<ApiAnswer> {
    const { method, path, body, idempotencyKey } = request;
    try {
      return await httpCall({
        host: this.#topology.replicas[replica]!.address,
        port: API_PORT,
        localAddress: this.#topology.callers,
        method,
        path,
        headers: { ...headers, "idempotency-key": idempotencyKey },
        text: body === undefined ? "" : JSON.stringify(body),
        patienceMs: this.#paced(CALLER_PATIENCE_MS),
      });
    } catch (cause) {
      throw new NoAnswer("no answer came", { cause });
    }
  }

  async #until(what: string, condition: () => Promise<boolean>): Promise<void> {
    const giveUpAt = performance.now() + START_LIMIT_MS;
    while (!(await condition())) {
      if (performance.now() > giveUpAt) throw new Error(`not in ${START_LIMIT_MS / 1_000} s: ${what}`);
      await sleep(LOOK_AGAIN_MS);
    }
  }
}
