/** The whole fleet in this process: replicas, agents, their network, on a real database. */
import { mkdtempSync, rmSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { z } from "zod";
import type { Send } from "../../../packages/host-agent/src/control-plane/control-plane-client.ts";
import { bootstrap } from "../../../packages/control-plane/src/service/teams-and-keys.ts";
import type { Random } from "../random.ts";
import type { Fault, Schedule } from "../schedule.ts";
import { type ApiAnswer, type ApiRequest, NoAnswer, type Observed, type World } from "../world.ts";
import type { SharedApi } from "./api.ts";
import { CredentialWatch } from "./credentials.ts";
import { RunDatabase } from "./database.ts";
import type { Databases } from "./databases.ts";
import { SimulatedHost } from "./host.ts";
import type { Log } from "./log.ts";
import { Network, orAborted } from "./network.ts";
import { Replica } from "./replica.ts";

/** Callers do not wait longer for an answer. */
const CALLER_PATIENCE_MS = 8_000;
const START_LIMIT_MS = 20_000;
const FIRST_PORT = 9_000;

const madeHost = z.object({ host: z.object({ id: z.string() }), registration_token: z.string() });
const hostStatus = z.object({ status: z.string() });
const refreshBody = z.object({ refresh_token: z.string() });
const registerBody = z.object({ token: z.string(), public_key: z.string() });

export interface WorldOptions {
  schedule: Schedule;
  random: Random;
  databases: Databases;
  api: SharedApi;
  log: Log;
}

export class InProcessWorld implements World {
  readonly #log: Log;
  readonly #random: Random;
  readonly #root: string;
  readonly #pace: number;
  readonly #network: Network;
  readonly #credentials = new CredentialWatch();
  readonly #replicas: Replica[];
  readonly #hosts: SimulatedHost[];
  readonly #database: RunDatabase;
  readonly #robbed = new Set<SimulatedHost>();
  readonly faults: Record<string, number> = {};
  /** Programs that are coming back. */
  readonly #returning = new Set<Promise<void>>();
  readonly #timers = new Set<NodeJS.Timeout>();
  #isClosing = false;
  #apiKey = "";

  private constructor(options: WorldOptions, root: string, database: RunDatabase) {
    const { schedule, random, api, log } = options;
    this.#log = log;
    this.#random = random.fork();
    this.#root = root;
    this.#database = database;
    const { pace } = schedule;
    this.#pace = pace;
    this.#network = new Network(random.fork(), pace);
    this.#hosts = Array.from({ length: schedule.hosts }, (_, index) => {
      const address = `127.0.0.1:${FIRST_PORT + index}`;
      const send = this.#sendOf(index, random.fork());
      return new SimulatedHost({
        index,
        root: join(root, `host${index}`),
        address,
        random: random.fork(),
        pace,
        send,
        log,
      });
    });
    const hostAt = (address: string) => this.#hosts[Number(address.split(":")[1]) - FIRST_PORT];
    this.#replicas = Array.from(
      { length: schedule.replicas },
      (_, index) => new Replica({ index, api, database, network: this.#network, pace, hostAt, log }),
    );
  }

  /** Up, with every host registered and online. */
  static async open(options: WorldOptions): Promise<InProcessWorld> {
    const root = mkdtempSync("/dev/shm/rk-faults-");
    const database = await RunDatabase.take(options.databases);
    const world = new InProcessWorld(options, root, database);
    try {
      await world.#begin();
      return world;
    } catch (cause) {
      await world[Symbol.asyncDispose]();
      throw cause;
    }
  }

  get doubleCredentials(): readonly string[] {
    return this.#credentials.violations;
  }

  get staleCommands(): readonly string[] {
    return this.#hosts.flatMap(({ generations }) => generations.violations);
  }

  /** One process: whatever ends by itself ends the run. */
  get brokenPrograms(): readonly string[] {
    return [];
  }

  async #begin(): Promise<void> {
    await Promise.all(this.#replicas.map((replica) => replica.start()));
    const { key } = await bootstrap(this.#replicas[0]!.plane!.deps, { newKey: true });
    this.#apiKey = key ?? "";
    for (const host of this.#hosts) {
      await host.start();
      const body = { name: `host-${host.index}`, type: "shared" };
      const answer = await this.call(0, { method: "POST", path: "/v1/hosts", body });
      if (answer.status !== 201) throw new Error(`no host was made: ${JSON.stringify(answer)}`);
      const { host: made, registration_token: token } = madeHost.parse(answer.body);
      await this.#register(host, made.id, token);
    }
    await this.#until(
      async () => (await this.#statuses()).every((status) => status === "online"),
      START_LIMIT_MS * this.#pace,
    );
  }

  async call(replica: number, request: ApiRequest): Promise<ApiAnswer> {
    const luck = this.#network.callersLuck();
    if (luck === "request-lost") throw new NoAnswer("the request was lost");
    const tooLong = sleep(CALLER_PATIENCE_MS * this.#pace, undefined, { ref: false }).then(() => {
      throw new NoAnswer("the caller gave up");
    });
    const answer = await Promise.race([this.#replicas[replica]!.call(request, this.#apiKey), tooLong]);
    if (luck === "answer-lost") throw new NoAnswer("the answer was lost");
    return answer;
  }

  async inject(fault: Fault): Promise<void> {
    this.faults[fault.kind] = (this.faults[fault.kind] ?? 0) + 1;
    this.#log.note(fault, "fault");
    switch (fault.kind) {
      case "cut":
      case "silence":
        return this.#network.begin(fault, fault.ms);
      case "loss":
        return this.#network.begin({ ...fault, direction: "both" }, fault.ms);
      // One process can't stand still in parts: nothing of it is heard, which is all that others see.
      case "agent-stall":
        return this.#network.begin({ kind: "silence", host: fault.host, direction: "both" }, fault.ms);
      case "replica-stall":
        for (const host of this.#hosts.keys()) {
          const silence = { kind: "silence", host, replica: fault.replica, direction: "both" } as const;
          this.#network.begin(silence, fault.ms);
        }
        return undefined;
      case "caller-loss":
        return this.#network.loseCallers(fault.share, fault.ms);
      case "replica-crash":
        return this.#return(() => this.#restartReplica(this.#replicas[fault.replica]!, fault.downMs));
      case "database-outage":
        await this.#database.goAway();
        return this.#after(fault.ms, () => this.#database.comeBack());
      case "database-cut":
        return this.#database.breakConnections();
      default:
        return this.#injectHost(fault, this.#hosts[fault.host]!);
    }
  }

  async #injectHost(fault: Extract<Fault, { host: number }>, host: SimulatedHost): Promise<void> {
    switch (fault.kind) {
      case "agent-crash":
        if (fault.failpoint === undefined) return this.#return(() => this.#restartHost(host, fault.downMs));
        host.onFailpoint = () => this.#return(() => this.#restartHost(host, fault.downMs));
        return host.arm(fault.failpoint, "halt", 1);
      case "host-reboot":
        return this.#return(() => this.#restartHost(host, fault.downMs, () => host.endAllVms()));
      case "clock-skew":
        host.skewMs = fault.skewMs;
        return this.#after(fault.ms, () => (host.skewMs = 0));
      case "disk-full":
        host.isDiskFull = true;
        return this.#after(fault.ms, () => (host.isDiskFull = false));
      case "trouble":
        host.troubleShare = fault.share;
        return this.#after(fault.ms, () => (host.troubleShare = 0));
      case "step-fails":
        return host.arm(fault.failpoint, "error", fault.times);
      case "guest-crash":
        return host.crashGuest(fault.guest);
      case "slow":
        host.delayMs = fault.delayMs;
        return this.#after(fault.ms, () => (host.delayMs = 0));
      case "stolen-token":
        return this.#steal(host);
      case "late-commands":
        host.lateCommands.begin(fault);
        if (fault.behindMs === 0) return undefined;
        host.skewMs = -fault.behindMs;
        return this.#after(fault.ms, () => (host.skewMs = 0));
      default:
        return undefined;
    }
  }

  async heal(): Promise<void> {
    for (const timer of this.#timers) clearTimeout(timer);
    this.#database.comeBack();
    for (const host of this.#hosts) {
      host.skewMs = 0;
      host.isDiskFull = false;
      host.troubleShare = 0;
      host.delayMs = 0;
      host.onFailpoint = undefined;
      host.disarm();
    }
    await this.#network.heal();
    await Promise.all(this.#hosts.map(({ lateCommands }) => lateCommands.end()));
    while (this.#returning.size > 0) await Promise.all(this.#returning);
    await Promise.all(this.#replicas.map((replica) => replica.start()));
    await Promise.all(this.#hosts.map((host) => this.#startHost(host)));
    await Promise.all([...this.#robbed].map((host) => this.#registerAnew(host)));
  }

  async observe(): Promise<Observed> {
    // The database first: what a machine says must not be older than what rows say of it.
    const seen = await this.#database.observe();
    const machines = await Promise.all(this.#hosts.filter(({ isUp }) => isUp).map((host) => host.facts()));
    return { ...seen, machines };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#isClosing = true;
    for (const timer of this.#timers) clearTimeout(timer);
    this.#database.comeBack();
    await this.#network.heal();
    await Promise.all(this.#hosts.map(({ lateCommands }) => lateCommands.end()));
    await Promise.all(this.#hosts.map((host) => host.crash()));
    await Promise.all(this.#returning);
    await Promise.all(this.#replicas.map((replica) => replica.crash()));
    await Promise.all(this.#hosts.map((host) => host.crash()));
    await this.#database[Symbol.asyncDispose]();
    rmSync(this.#root, { recursive: true, force: true });
  }

  #after(ms: number, end: () => void): void {
    const timer = setTimeout(() => {
      this.#timers.delete(timer);
      end();
    }, ms * this.#pace);
    this.#timers.add(timer);
  }

  #return(work: () => Promise<void>): void {
    const returning = work()
      .catch((cause: unknown) => this.#log.note({ err: cause }, "something did not come back"))
      .finally(() => this.#returning.delete(returning));
    this.#returning.add(returning);
  }

  async #restartReplica(replica: Replica, downMs: number): Promise<void> {
    await replica.crash();
    await sleep(downMs * this.#pace);
    await replica.start(() => !this.#isClosing);
  }

  async #restartHost(
    host: SimulatedHost,
    downMs: number,
    meanwhile: () => void = () => undefined,
  ): Promise<void> {
    await host.crash();
    meanwhile();
    await sleep(downMs * this.#pace);
    await this.#startHost(host);
  }

  /** As whoever runs it does: again, until it stays up. */
  async #startHost(host: SimulatedHost): Promise<void> {
    while (!host.isUp && !this.#isClosing) {
      try {
        await host.start();
      } catch (cause) {
        this.#log.note({ host: host.index, err: cause }, "an agent could not start yet");
        await host.crash();
      }
      if (!host.isUp) await sleep(30);
    }
  }

  /** A thief shows a token that the host has, or had. */
  async #steal(host: SimulatedHost): Promise<void> {
    const token = host.refreshTokens.at(this.#random.chance(0.5) ? -1 : -2);
    if (token === undefined) return;
    this.#robbed.add(host);
    const replica = this.#random.pick(this.#replicas);
    const body = { refresh_token: token };
    const show = () => replica.answer({ method: "POST", path: "/v1/hosts/auth/refresh", body, headers: {} });
    await this.#credentials.refresh(token, show).catch((cause: unknown) => {
      if (!(cause instanceof NoAnswer)) throw cause;
    });
  }

  /** As an operator does it: when the answer got lost, with another token. */
  async #register(host: SimulatedHost, id: string, token: string): Promise<void> {
    for (let next = token; ;) {
      try {
        return await host.register(next);
      } catch (cause) {
        this.#log.note({ host: host.index, err: cause }, "a registration did not get through");
      }
      const { body } = await this.call(0, { method: "POST", path: `/v1/hosts/${id}/token` });
      next = madeHost.parse(body).registration_token;
    }
  }

  /** For a host that was cut off because one of its tokens was stolen. */
  async #registerAnew(host: SimulatedHost): Promise<void> {
    const id = host.hostId ?? "";
    // The theft shows when the host next renews its token, if it was one that still counted.
    await sleep(3_500 * this.#pace);
    if ((await this.#statusOf(host)) === "online") return;
    const { body } = await this.call(0, { method: "POST", path: `/v1/hosts/${id}/token` });
    await this.#register(host, id, madeHost.parse(body).registration_token);
  }

  async #statusOf(host: SimulatedHost): Promise<string> {
    const { body } = await this.call(0, { method: "GET", path: `/v1/hosts/${host.hostId}` });
    return hostStatus.parse(body).status;
  }

  async #statuses(): Promise<string[]> {
    return await Promise.all(this.#hosts.map((host) => this.#statusOf(host)));
  }

  async #until(condition: () => Promise<boolean>, limitMs: number): Promise<void> {
    const giveUpAt = performance.now() + limitMs;
    while (!(await condition())) {
      if (performance.now() > giveUpAt) throw new Error("the fleet did not come up");
      await sleep(20);
    }
  }

  #sendOf(host: number, random: Random): Send {
    return async (url, { method, headers, body, signal }) => {
      const replica = random.between(0, this.#replicas.length - 1);
      const request = { method, path: url.pathname, body: JSON.parse(body) as unknown, headers };
      const deliver = () => this.#replicas[replica]!.answer(request);
      const link = { host, replica, way: "heartbeats" as const };
      const broken = (code: string) => Object.assign(new Error(`the connection failed: ${code}`), { code });
      const answered = this.#network.carry(link, () => this.#watched(request, deliver), broken);
      const answer = await orAborted(signal, answered);
      if (url.pathname.endsWith("/auth/refresh") && answer.status === 200) {
        this.#hosts[host]!.refreshTokens.push(refreshBody.parse(answer.body).refresh_token);
      }
      return { statusCode: answer.status, body: bodyOf(answer) };
    };
  }

  async #watched(
    { path, body }: { path: string; body: unknown },
    deliver: () => Promise<ApiAnswer>,
  ): Promise<ApiAnswer> {
    if (path.endsWith("/auth/refresh")) {
      return await this.#credentials.refresh(refreshBody.parse(body).refresh_token, deliver);
    }
    if (path.endsWith("/register"))
      return await this.#credentials.register(registerBody.parse(body), deliver);
    return await deliver();
  }
}

async function* bodyOf({ body }: ApiAnswer): AsyncGenerator<Uint8Array> {
  yield Buffer.from(JSON.stringify(body ?? null));
}
