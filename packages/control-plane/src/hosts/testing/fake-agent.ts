/**
 * A host agent for tests: real Connect RPC over real HTTP/2, sandboxes in memory.
 *
 * It keeps the contract's rules (generations, joined repeats, tombstones,
 * events) and does nothing else. Tests get between by `before` and `after`,
 * which run around each call's effect and may wait or throw.
 */
import { type Http2Server, createServer } from "node:http2";
import type { AddressInfo } from "node:net";
import type { MessageInitShape } from "@bufbuild/protobuf";
import { ConnectError, type ConnectRouter, type ServiceImpl } from "@connectrpc/connect";
import { connectNodeAdapter } from "@connectrpc/connect-node";
import { ERRORS, type ErrorCode, RookeryError } from "@rookery/protocol/errors";
import { digestOfSandboxes } from "@rookery/protocol/sandbox-digest";
import {
  ErrorInfoSchema,
  HostAgentService,
  type HostEventSchema,
  type ReadFileRequest,
  SandboxPhase,
  type SandboxSchema,
  type StreamEventsRequest,
  type WriteFileRequest,
} from "@rookery/protocol/hostagent";

type Phase = keyof typeof SandboxPhase;
export interface FakeSandbox {
  phase: Phase;
  generation: bigint;
  source: string | undefined;
  envdAccessToken: string;
  timeoutSec: number;
  exit?: { code: string; message: string };
  /** Since when it is a stranger (FreezeSandbox), and what it was before. */
  stranger?: { sinceMs: number; before: Phase };
}
export interface Call {
  method: string;
  id: string;
  generation?: bigint;
}
type Hook = (call: Call) => Promise<void> | void;
type FakeEvent = MessageInitShape<typeof HostEventSchema>;

export class FakeAgent {
  readonly sandboxes = new Map<string, FakeSandbox>();
  readonly snapshots = new Set<string>();
  /** Of those, which lie in the object store of that name. */
  readonly stored = new Map<string, string>();
  compat = "";
  readonly files = new Map<string, Buffer>();
  readonly calls: Call[] = [];
  readonly tokens = new Set<string>();
  readonly events: (FakeEvent & { number: bigint })[] = [];
  logId = "log-1";
  acknowledged = 0n;
  before: Hook = () => undefined;
  after: Hook = () => undefined;
  /** The last command per sandbox, also of those that are gone. */
  readonly #last = new Map<string, { method: string; generation: bigint; answer: unknown }>();
  #changed = Promise.withResolvers<void>();
  /** It is being disposed of: streams end instead of waiting for what never comes. */
  #isGone = false;
  #server: Http2Server | undefined;
  #port = 0;
  #hangUps: (() => void)[] = [];

  get address(): string {
    return `127.0.0.1:${this.#port}`;
  }

  async listen(): Promise<this> {
    const routes = (router: ConnectRouter): void => {
      router.service(HostAgentService, this.#service());
    };
    const server = createServer(
      connectNodeAdapter({
        routes,
        interceptors: [
          (next) => (request) => {
            this.tokens.add(request.header.get("authorization")?.replace("Bearer ", "") ?? "");
            return next(request);
          },
        ],
      }),
    );
    server.on("session", (session) => this.#hangUps.push(() => session.destroy()));
    await new Promise<void>((resolve) => server.listen(this.#port, "127.0.0.1", resolve));
    this.#server = server;
    this.#port = (server.address() as AddressInfo).port;
    return this;
  }

  /** Its connections break, and new ones are taken. */
  hangUp(): void {
    for (const hangUp of this.#hangUps.splice(0)) hangUp();
  }

  /** As when its process dies: connections break, nobody listens. `listen` brings it back. */
  async close(): Promise<void> {
    this.hangUp();
    await new Promise((resolve) => (this.#server ? this.#server.close(resolve) : resolve(undefined)));
    this.#server = undefined;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#isGone = true;
    this.#changed.resolve();
    await this.close();
  }

  /** Something that it did by itself: the phase changes and the log says so. */
  emit(event: FakeEvent & { sandboxId: string }, phase?: Phase): void {
    const sandbox = this.sandboxes.get(event.sandboxId);
    if (sandbox && phase) sandbox.phase = phase;
    const number = BigInt(this.events.length + 1);
    this.events.push({ generation: sandbox?.generation ?? 0n, ...event, number });
    this.#changed.resolve();
    this.#changed = Promise.withResolvers();
  }

  /** What its heartbeat would say. */
  get digest(): string {
    return digestOfSandboxes(
      [...this.sandboxes].map(([id, { phase, generation }]) => ({
        id,
        status: phase.toLowerCase(),
        generation,
      })),
    );
  }

  callsOf(method: string): Call[] {
    return this.calls.filter((call) => call.method === method);
  }

  async #around<T>(call: Call, effect: () => T): Promise<T> {
    this.calls.push(call);
    try {
      await this.before(call);
      const answer = effect();
      await this.after(call);
      return answer;
    } catch (cause) {
      throw toConnectError(cause);
    }
  }

  #command<T>(
    method: string,
    operation: { sandboxId: string; generation: bigint } | undefined,
    effect: (id: string, generation: bigint) => T,
  ) {
    const { sandboxId: id, generation } = operation ?? { sandboxId: "", generation: 0n };
    return this.#around({ method, id, generation }, () => {
      const last = this.#last.get(id);
      if (last && generation < last.generation)
        throw new RookeryError("stale_generation", "older than known");
      const isRepeated = last?.generation === generation && last.method === method;
      // A snapshot leaves the generation alone: its id tells repetitions.
      if (isRepeated && method !== "createSnapshot") return last.answer as T;
      const sandbox = this.sandboxes.get(id);
      if (sandbox) sandbox.generation = generation;
      this.#last.set(id, { method, generation, answer: undefined });
      const answer = effect(id, generation);
      this.#last.set(id, { method, generation, answer });
      return answer;
    });
  }

  #has(id: string): FakeSandbox {
    const sandbox = this.sandboxes.get(id);
    if (!sandbox) throw new RookeryError("not_found", "No such sandbox");
    return sandbox;
  }

  #in(id: string, ...phases: Phase[]): FakeSandbox {
    const sandbox = this.#has(id);
    if (!phases.includes(sandbox.phase)) throw new RookeryError("wrong_state", `It is ${sandbox.phase}`);
    return sandbox;
  }

  #view(id: string): MessageInitShape<typeof SandboxSchema> {
    const { phase, generation, timeoutSec, exit, stranger } = this.#has(id);
    return {
      sandboxId: id,
      phase: SandboxPhase[phase],
      generation,
      vcpus: 1,
      memoryMb: 512,
      diskMb: 4096,
      diskUsedBytes: 12_288n,
      startedAtUnixMs: 1_000n,
      expiresAtUnixMs: phase === "RUNNING" && timeoutSec > 0 ? BigInt(Date.now() + timeoutSec * 1000) : 0n,
      strangerForMs: stranger && BigInt(Date.now() - stranger.sinceMs),
      inMemory: stranger?.before === "RUNNING",
      exitCode: exit?.code ?? "",
      exitMessage: exit?.message ?? "",
    };
  }

  #service(): Partial<ServiceImpl<typeof HostAgentService>> {
    return {
      createSandbox: ({ operation, source, envdAccessToken, lifetime }) =>
        this.#command("createSandbox", operation, (id, generation) => {
          const made = { phase: "RUNNING" as const, generation, source: source.value, envdAccessToken };
          if (!this.sandboxes.has(id))
            this.sandboxes.set(id, { ...made, timeoutSec: lifetime?.timeoutSec ?? 0 });
          return { sandbox: this.#view(id) };
        }),
      destroySandbox: ({ operation }) =>
        this.#command("destroySandbox", operation, (id) => {
          this.sandboxes.delete(id);
          return {};
        }),
      pauseSandbox: ({ operation }) =>
        this.#command("pauseSandbox", operation, (id) => {
          this.#in(id, "RUNNING").phase = "PAUSED";
          return { sandbox: this.#view(id) };
        }),
      resumeSandbox: ({ operation }) =>
        this.#command("resumeSandbox", operation, (id) => {
          this.#in(id, "PAUSED").phase = "RUNNING";
          return { sandbox: this.#view(id) };
        }),
      pingSandbox: ({ sandboxId }) =>
        this.#around({ method: "pingSandbox", id: sandboxId }, () => {
          this.#in(sandboxId, "RUNNING");
          return { expiresAtUnixMs: 1n };
        }),
      updateSandbox: ({ sandboxId, lifetime }) =>
        this.#around({ method: "updateSandbox", id: sandboxId }, () => {
          this.#in(sandboxId, "RUNNING", "PAUSED").timeoutSec = lifetime?.timeoutSec ?? 0;
          return { sandbox: this.#view(sandboxId) };
        }),
      getSandbox: ({ sandboxId }) =>
        this.#around({ method: "getSandbox", id: sandboxId }, () => ({ sandbox: this.#view(sandboxId) })),
      listSandboxes: ({ afterSandboxId, limit }) =>
        this.#around({ method: "listSandboxes", id: "" }, () => {
          const ids = [...this.sandboxes.keys()].filter((id) => id > afterSandboxId).sort();
          return { sandboxes: ids.slice(0, limit).map((id) => this.#view(id)), more: ids.length > limit };
        }),
      freezeSandbox: ({ sandboxId }) =>
        this.#around({ method: "freezeSandbox", id: sandboxId }, () => {
          const sandbox = this.#in(sandboxId, "RUNNING", "PAUSED", "FAILED");
          sandbox.stranger ??= { sinceMs: Date.now(), before: sandbox.phase };
          if (sandbox.phase === "RUNNING") sandbox.phase = "PAUSED";
          return { sandbox: this.#view(sandboxId) };
        }),
      thawSandbox: ({ sandboxId }) =>
        this.#around({ method: "thawSandbox", id: sandboxId }, () => {
          const sandbox = this.#has(sandboxId);
          if (sandbox.stranger) sandbox.phase = sandbox.stranger.before;
          delete sandbox.stranger;
          return { sandbox: this.#view(sandboxId) };
        }),
      endHost: () =>
        this.#around({ method: "endHost", id: "" }, () => {
          this.sandboxes.clear();
          this.snapshots.clear();
          return {};
        }),
      exec: ({ sandboxId, command }) =>
        this.#around({ method: "exec", id: sandboxId }, () => {
          this.#in(sandboxId, "RUNNING");
          return {
            stdout: Buffer.from(`${command?.cmd} ${command?.args.join(" ")}`),
            exitCode: 0,
            durationMs: 1,
          };
        }),
      writeFile: (requests) => this.#writeFile(requests),
      readFile: (request) => this.#readFile(request),
      createSnapshot: ({ operation, snapshotId }) =>
        this.#command("createSnapshot", operation, (id) => {
          this.#in(id, "RUNNING", "PAUSED");
          this.snapshots.add(snapshotId);
          return { vcpus: 1, memoryMb: 512, diskMb: 4096, sizeBytes: 5_000_000_000n, compat: this.compat };
        }),
      getSnapshots: ({ snapshotIds }) =>
        this.#around({ method: "getSnapshots", id: "" }, () => ({
          snapshots: snapshotIds
            .filter((id) => this.snapshots.has(id))
            .map((snapshotId) => ({ snapshotId, storeId: this.stored.get(snapshotId) ?? "" })),
        })),
      deleteSnapshot: ({ snapshotId }) =>
        this.#around({ method: "deleteSnapshot", id: snapshotId }, () => {
          this.snapshots.delete(snapshotId);
          return {};
        }),
      streamEvents: (request, { signal }) => this.#streamEvents(request, signal),
      acknowledgeEvents: ({ number }) =>
        this.#around({ method: "acknowledgeEvents", id: "", generation: number }, () => {
          this.acknowledged = number;
          return {};
        }),
    };
  }

  async #writeFile(requests: AsyncIterable<WriteFileRequest>) {
    const chunks: Buffer[] = [];
    let at = "";
    for await (const { part } of requests) {
      if (part.case === "start") {
        at = `${part.value.sandboxId}:${part.value.path}`;
        await this.#around({ method: "writeFile", id: part.value.sandboxId }, () =>
          this.#has(part.value.sandboxId),
        );
      }
      if (part.case === "chunk") chunks.push(Buffer.from(part.value));
    }
    this.files.set(at, Buffer.concat(chunks));
    return { sizeBytes: BigInt(this.files.get(at)?.length ?? 0) };
  }

  async *#readFile({ sandboxId, path }: ReadFileRequest) {
    await this.#around({ method: "readFile", id: sandboxId }, () => this.#in(sandboxId, "RUNNING"));
    const file = this.files.get(`${sandboxId}:${path}`);
    if (!file) throw toConnectError(new RookeryError("file_not_found", "No such file"));
    yield { sizeBytes: BigInt(file.length) };
    for (let at = 0; at < file.length; at += 65_536) yield { chunk: file.subarray(at, at + 65_536) };
  }

  async *#streamEvents({ afterNumber, follow }: StreamEventsRequest, signal: AbortSignal) {
    await this.#around({ method: "streamEvents", id: "", generation: afterNumber }, () => undefined);
    yield { logId: this.logId };
    for (let at = afterNumber; !signal.aborted && !this.#isGone;) {
      const changed = this.#changed.promise;
      for (const event of this.events.filter(({ number }) => number > at)) {
        at = event.number;
        yield { logId: this.logId, event };
      }
      if (!follow) return;
      await Promise.race([
        changed,
        new Promise((resolve) => signal.addEventListener("abort", resolve, { once: true })),
      ]);
    }
  }
}

/** What the real border does, in short. */
export function toConnectError(cause: unknown): ConnectError {
  if (!(cause instanceof RookeryError)) return ConnectError.from(cause);
  const details = Object.fromEntries(
    Object.entries(cause.details ?? {}).map(([key, value]) => [key, String(value)]),
  );
  return new ConnectError(cause.message, ERRORS[cause.code].rpc, undefined, [
    { desc: ErrorInfoSchema, value: { code: cause.code, details } },
  ]);
}

/** A hook that fails one kind of call, for as long as it is set. */
export const failing =
  (method: string, code: ErrorCode): Hook =>
  (call) => {
    if (call.method === method) throw new RookeryError(code, `the test says ${code}`);
  };

/** A hook that holds one kind of call until it is released. */
export function holding(method: string): { hook: Hook; arrived: Promise<void>; release(this: void): void } {
  const arrived = Promise.withResolvers<void>();
  const released = Promise.withResolvers<void>();
  return {
    arrived: arrived.promise,
    release: released.resolve,
    hook: async (call) => {
      if (call.method !== method) return;
      arrived.resolve();
      await released.promise;
    },
  };
}
