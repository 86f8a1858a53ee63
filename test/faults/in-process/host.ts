/**
 * One machine with an agent on it: the real core, journal, event log, RPC
 * service and link, over simulated VMs that outlive the agent.
 */
import { type Interceptor, createConnectRouter } from "@connectrpc/connect";
import {
  type UniversalClientRequest,
  type UniversalClientResponse,
  createUniversalHandlerClient,
} from "@connectrpc/connect/protocol";
import { HostAgentService } from "@rookery/protocol/hostagent";
import { setTimeout as sleep } from "node:timers/promises";
import {
  ControlPlaneClient,
  type Send,
} from "../../../packages/host-agent/src/control-plane/control-plane-client.ts";
import { ControlPlaneLink } from "../../../packages/host-agent/src/control-plane/control-plane-link.ts";
import { CredentialStore } from "../../../packages/host-agent/src/control-plane/credentials.ts";
import { registerHost } from "../../../packages/host-agent/src/control-plane/register.ts";
import { TokenVerifier } from "../../../packages/host-agent/src/rpc/auth.ts";
import { TRUST, logAndTranslate } from "../../../packages/host-agent/src/rpc/interceptors.ts";
import { hostAgentService } from "../../../packages/host-agent/src/rpc/service.ts";
import { type Clock, systemClock } from "../../../packages/host-agent/src/sandbox-manager/clock.ts";
import type { Core } from "../../../packages/host-agent/src/sandbox-manager/core.ts";
import type { Deps } from "../../../packages/host-agent/src/sandbox-manager/deps.ts";
import {
  FAILPOINTS,
  openCore,
  type SandboxManager,
} from "../../../packages/host-agent/src/sandbox-manager/index.ts";
import {
  type SimulatedMachine,
  openSimulatedMachine,
} from "../../../packages/host-agent/src/sandbox-manager/testing/simulated-machine.ts";
import { SimulatedGuests } from "../../../packages/host-agent/src/guest/simulated-guests.ts";
import { memoryProcessTable } from "../../../packages/host-agent/src/vmm/simulated-processes.ts";
import type { Random } from "../random.ts";
import type { MachineFacts } from "../world.ts";
import { GenerationWatch } from "./generations.ts";
import { LateCommands } from "./late-commands.ts";
import { leaksOf } from "./leaks.ts";
import { Life, never } from "./life.ts";
import type { Log } from "./log.ts";

const CONFIG = {
  reaperIntervalMs: 100,
  retryIntervalMs: 150,
  undoTimeoutMs: 3_000,
  ownWorkTimeoutMs: 3_000,
  maxSandboxes: 40,
  hang: { intervalMs: 0, timeoutMs: 500, misses: 3 },
};
const INTERVALS = { heartbeatMs: 200, lostAfterMs: 1_500 };
const EXCHANGE_TIMEOUT_MS = 400;
const REGISTRATION_LIMIT_MS = 5_000;

export interface HostDeps {
  index: number;
  root: string;
  address: string;
  random: Random;
  pace: number;
  /** Its requests, to whichever replica. */
  send: Send;
  log: Log;
}

interface Incarnation {
  life: Life;
  machine: SimulatedMachine;
  core: Core;
  manager: SandboxManager;
  store: CredentialStore;
  client: ControlPlaneClient;
  clock: Clock;
  serve: (request: UniversalClientRequest) => Promise<UniversalClientResponse>;
}

export class SimulatedHost {
  readonly #deps: HostDeps;
  readonly #processes = memoryProcessTable();
  #boot = 1;
  #incarnations = 0;
  #current: Incarnation | undefined;
  #starting: { life: Life } | undefined;

  /** What is wrong with the machine at present. */
  skewMs = 0;
  isDiskFull = false;
  troubleShare = 0;
  delayMs = 0;
  /** Called when a failpoint that was to end the agent is reached. */
  onFailpoint: (() => void) | undefined;
  readonly lateCommands = new LateCommands();
  readonly generations = new GenerationWatch((sandboxId, generation) =>
    this.lateCommands.arriveAfter(sandboxId, generation),
  );
  /** Refresh tokens that it had, oldest first. */
  readonly refreshTokens: string[] = [];

  constructor(deps: HostDeps) {
    this.#deps = deps;
  }

  get index(): number {
    return this.#deps.index;
  }

  get hostId(): string | undefined {
    return this.#current?.store.current?.hostId;
  }

  get isUp(): boolean {
    return this.#current !== undefined;
  }

  /** An agent recovers what the one before it left, and serves. */
  async start(): Promise<void> {
    if (this.#current !== undefined || this.#starting !== undefined) return;
    const { root, random, log, index, pace } = this.#deps;
    this.#incarnations += 1;
    const life = new Life();
    this.#starting = { life };
    const logger = log.of(`agent${index}x${this.#incarnations}`);
    const clock = this.#clockOf(life);
    const machine = openSimulatedMachine(root, {
      clock,
      bootId: `boot-${this.#boot}`,
      config: {
        ...CONFIG,
        undoTimeoutMs: CONFIG.undoTimeoutMs * pace,
        ownWorkTimeoutMs: CONFIG.ownWorkTimeoutMs * pace,
      },
      seed: random.between(1, 2 ** 31),
      processes: this.#processes,
      trouble: (effect) => this.#trouble(effect),
      pause: async () => {
        if (this.delayMs > 0) await sleep(this.delayMs * this.#deps.pace);
      },
      logger,
    });
    const deps = this.#mortal(machine.deps, life);
    const opened = await Promise.race([
      openCore(deps),
      new Promise<undefined>((resolve) => {
        life.signal.addEventListener("abort", () => resolve(undefined), { once: true });
      }),
    ]);
    if (opened === undefined || life.isOver) return;
    const { core, manager } = opened;
    life.guard(core.journal, () => this.#writeOrFail());
    life.guard(core.tombstones, () => this.#writeOrFail());
    life.guard(core.events, () => this.#writeOrFail());
    const store = life.guard(await CredentialStore.open(machine.deps.config.dataDir), () =>
      this.#writeOrFail(),
    );
    const client = new ControlPlaneClient("http://control-plane.test", {
      timeoutMs: EXCHANGE_TIMEOUT_MS * pace,
      send: (url, request) => life.hear(this.#deps.send(url, request)),
    });
    const verifier = new TokenVerifier(() => store.current, clock);
    // The server's gate does the same before anything of a request is read.
    const authenticate: Interceptor = (next) => async (call) => {
      call.contextValues.set(TRUST, await verifier.verify(call.header.get("authorization")));
      return next(call);
    };
    const router = createConnectRouter({
      interceptors: [logAndTranslate(logger, clock), authenticate],
      connect: true,
      grpc: false,
      grpcWeb: false,
    });
    const envd = new SimulatedGuests({ processes: this.#processes });
    router.service(
      HostAgentService,
      hostAgentService({
        operations: this.generations.around(manager),
        envd,
        clock,
        closing: life.signal,
        endHost: never,
      }),
    );
    const handle = createUniversalHandlerClient(router.handlers);
    this.#current = { life, machine, core, manager, store, client, clock, serve: handle };
    this.#starting = undefined;
    if (store.current !== undefined) this.#link();
  }

  /** Registers with a one-time token, and begins to beat. */
  async register(token: string): Promise<void> {
    const { store, client } = this.#require();
    const host = {
      address: this.#deps.address,
      arch: "x64",
      cpus: 2,
      memoryMb: 16_384,
      diskMb: 100_000,
      drivers: { vmm: "simulated", root_disk: "simulated", network: "simulated" },
      version: "0.0.0-faults",
    };
    const deps = { client, store, controlPlaneUrl: "http://control-plane.test", reach: () => undefined };
    const isFirst = store.current === undefined;
    await registerHost(deps, token, host, AbortSignal.timeout(REGISTRATION_LIMIT_MS * this.#deps.pace));
    if (isFirst) this.#link();
  }

  /** Its VMs go on. Returns when nothing of it has an effect any more. */
  async crash(): Promise<void> {
    const dying = this.#current;
    const life = dying?.life ?? this.#starting?.life;
    this.#current = undefined;
    this.#starting = undefined;
    await life?.end();
    if (dying === undefined) return;
    // Their files' handles are our process's.
    await dying.life.afterwards(() =>
      Promise.allSettled([dying.core.events.close(), dying.core.tombstones.close()]),
    );
    await dying.machine.vmm.close();
  }

  /** All that lived in the machine's memory is gone. */
  endAllVms(): void {
    this.#boot += 1;
    for (const { pid } of this.#processes.all()) this.#processes.delete(pid);
  }

  crashGuest(choice: number): void {
    const running = this.#processes.all().filter(({ state }) => state === "running");
    const victim = running[Math.floor(choice * running.length)];
    if (victim === undefined) return;
    const exit = { reason: "guest_crashed" as const, message: "the guest's kernel panicked" };
    if (this.#current === undefined) this.#processes.delete(victim.pid);
    else this.#current.machine.vmm.crash(victim.pid, exit);
  }

  /** Lets a step fail, or the agent end there. */
  arm(choice: number, action: "error" | "halt", times: number): void {
    const name = FAILPOINTS[Math.floor(choice * FAILPOINTS.length)];
    if (name !== undefined) this.#current?.machine.deps.failpoints.arm(name, action, times);
  }

  disarm(): void {
    this.#current?.machine.deps.failpoints.disarmAll();
  }

  /** A request that reached the machine. */
  async serve(request: UniversalClientRequest): Promise<UniversalClientResponse> {
    const serving = this.#current;
    if (serving === undefined) throw new Error("connection refused");
    const answer = await serving.life.orEnd(serving.serve(request));
    return { ...answer, body: untilEnd(answer.body, serving.life) };
  }

  async facts(): Promise<MachineFacts> {
    const { core, machine, manager } = this.#require();
    const { items } = await manager.list({ limit: 1_000 });
    return {
      hostId: this.hostId ?? "",
      isUp: true,
      sandboxes: items.map(({ id, phase, generation }) => ({
        id,
        phase,
        generation,
        vmId: core.sandboxes.get(id)?.record.vm?.vmId,
      })),
      vms: this.#processes.all().map(({ place, state, corrupt, guest }) => ({
        vmId: place.vmId,
        state,
        corrupt,
        memory: guest.memory,
      })),
      snapshots: [...core.snapshots.keys()],
      leaks: leaksOf(core, machine),
      eventLogId: core.events.logId,
      lastEvent: core.events.lastNumber,
    };
  }

  #require(): Incarnation {
    if (this.#current === undefined) throw new Error("the agent is down");
    return this.#current;
  }

  #link(): void {
    const { life, core, manager, store, client, clock } = this.#require();
    const { log, index, random, pace } = this.#deps;
    const logger = log.of(`link${index}x${this.#incarnations}`);
    const linkRandom = random.fork();
    const link = new ControlPlaneLink({
      client,
      store,
      clock,
      logger,
      intervals: {
        heartbeatMs: INTERVALS.heartbeatMs * pace,
        lostAfterMs: INTERVALS.lostAfterMs * pace,
      },
      random: () => linkRandom.next(),
      sandboxes: () => manager.outline(),
      load: async (sandboxes) => ({ cpus: 0, memoryMbUsed: 0, diskMbFree: 50_000, sandboxes }),
      snapshots: async () => ({ compat: "simulated" }),
      events: core.events,
      pauseAll: async () => {
        await manager.pauseAll({ reason: "control_plane_lost", message: "the host lost its control plane" });
      },
      // No schedule deletes a host.
      endHost: never,
      reach: () => undefined,
    });
    void link.run(life.signal).catch(() => undefined);
  }

  #clockOf(life: Life): Clock {
    return {
      nowMs: () => systemClock.nowMs() + this.skewMs,
      monotonicMs: () => systemClock.monotonicMs(),
      after: (delayMs, run) =>
        systemClock.after(delayMs, () => {
          if (!life.isOver) run();
        }),
    };
  }

  #trouble(effect: string): void {
    if (this.isDiskFull && effect.startsWith("disk.") && !/remove|detach|abort/.test(effect))
      throw fullDisk();
    if (this.troubleShare > 0 && this.#deps.random.chance(this.troubleShare))
      throw new Error(`trouble in ${effect}`);
  }

  #writeOrFail(): void {
    if (this.isDiskFull && this.#deps.random.chance(0.5)) throw fullDisk();
  }

  /** The seams, as long as the agent lives. */
  #mortal(deps: Deps, life: Life): Deps {
    const { vmm, rootDisk, network, cgroups, guest, failpoints } = deps;
    const guardVm = <T extends object>(vm: T): T => life.guard(vm);
    const boot = vmm.boot.bind(vmm);
    const spawnClone = vmm.spawnClone.bind(vmm);
    const adopt = vmm.adopt.bind(vmm);
    vmm.boot = (...args) => life.through(async () => guardVm(await boot(...args)));
    vmm.spawnClone = (...args) => life.through(async () => guardVm(await spawnClone(...args)));
    vmm.adopt = (...args) =>
      life.through(async () => {
        const vm = await adopt(...args);
        return vm && guardVm(vm);
      });
    life.guard(rootDisk);
    life.guard(network);
    life.guard(cgroups);
    life.guard(guest);
    const reach = failpoints.reach.bind(failpoints);
    failpoints.record();
    failpoints.reach = (name) => (life.isOver ? never() : reach(name));
    void failpoints.halted.then(() => this.onFailpoint?.());
    return deps;
  }
}

async function* untilEnd(body: AsyncIterable<Uint8Array>, life: Life): AsyncGenerator<Uint8Array> {
  const parts = body[Symbol.asyncIterator]();
  for (;;) {
    const next = await life.orEnd(parts.next());
    if (next.done === true) return;
    yield next.value;
  }
}

function fullDisk(): Error {
  return Object.assign(new Error("ENOSPC: no space left on device"), {
    code: "ENOSPC",
    errno: -28,
    syscall: "write",
  });
}
