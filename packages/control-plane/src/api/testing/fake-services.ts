/**
 * Services in memory, for tests of the API alone. It keeps the rules that the
 * API's callers can see (teams, states, idempotency, pages) and runs nothing:
 * what a command or file does is set by the test.
 */
import { RookeryError } from "@rookery/protocol/errors";
import { randomBytes } from "node:crypto";
import { once } from "node:events";
import type { ApiKeyId, HostId, SandboxId, SnapshotId, TeamId } from "../../model/ids.ts";
import { type PageInput, page } from "./fake-pages.ts";
import { isFinal } from "../../model/sandbox-state.ts";
import type { Sandbox, SandboxStatus } from "../../model/sandbox.ts";
import type {
  Answer,
  ApiKey,
  Caller,
  Creation,
  ExecInput,
  ExecResult,
  FollowedEvent,
  FollowEventsInput,
  Host,
  Page,
  Role,
  SandboxEvent,
  Services,
  Snapshot,
  Team,
  Template,
} from "../../service/services.ts";

type Owned<T> = T & { teamId: TeamId };
type ExecBehaviour = (input: ExecInput, signal: AbortSignal) => Promise<ExecResult>;

export class FakeServices implements Services {
  /** Of whom the callers are: a platform key of team A, a member's of team B. */
  readonly keys = { platform: keyText("rk_"), member: keyText("rk_") };
  readonly sandboxes = new Map<SandboxId, Sandbox>();
  readonly files = new Map<string, Uint8Array>();
  /** Set by tests. */
  isReady = true;
  onExec: ExecBehaviour = async (input) => output({ stdout: `${input.cmd} ${input.args.join(" ")}`.trim() });
  failure: Error | undefined;

  readonly #callers = new Map<string, Caller>();
  readonly #apiKeys = new Map<ApiKeyId, ApiKey>();
  readonly #teams = new Map<TeamId, Team>();
  readonly #snapshots = new Map<SnapshotId, Owned<Snapshot>>();
  readonly #hosts = new Map<HostId, Host>();
  readonly #answers = new Map<string, { fingerprint: string; answer: Promise<Answer> }>();

  constructor() {
    this.#addTeam("a", this.keys.platform, "platform");
    this.#addTeam("b", this.keys.member, "member");
  }

  async authenticate(presented: string): Promise<Caller> {
    this.#mayFail();
    const caller = this.#callers.get(presented.replace(/^e2b_/, "rk_"));
    if (caller === undefined) throw new RookeryError("unauthenticated", "this API key is not known");
    return caller;
  }

  /** As when another replica deleted it. */
  revoke(key: string): void {
    this.#callers.delete(key);
  }

  async checkReady(): Promise<void> {
    if (!this.isReady) throw new RookeryError("unavailable", "the database does not answer");
  }

  async idempotent<Made>(
    caller: Caller,
    key: string,
    fingerprint: string,
    creation: Creation<Made>,
  ): Promise<Answer> {
    const place = `${caller.teamId} ${key}`;
    const known = this.#answers.get(place);
    if (known === undefined) {
      const answer = creation.make().then((made) => creation.answer(made));
      this.#answers.set(place, { fingerprint, answer });
      return answer;
    }
    if (known.fingerprint !== fingerprint) {
      throw new RookeryError("idempotency_mismatch", "this key was used with another body");
    }
    return known.answer;
  }

  async createSandbox(caller: Caller, input: Parameters<Services["createSandbox"]>[1]): Promise<Sandbox> {
    this.#mayFail();
    if (input.template !== "base") throw new RookeryError("template_not_found", "there is no such template");
    const sandbox: Sandbox = {
      ...input,
      id: newId("sb", 18) as SandboxId,
      teamId: caller.teamId,
      status: "running",
      generation: 1n,
      hostId: newId("host-") as HostId,
      vcpus: input.vcpus ?? 1,
      memoryMb: input.memoryMb ?? 512,
      diskMb: input.diskMb ?? 4096,
      createdAt: new Date(),
      startedAt: new Date(),
      diskUsedBytes: 4096,
    };
    this.sandboxes.set(sandbox.id, sandbox);
    return sandbox;
  }

  async listSandboxes(
    caller: Caller,
    input: Parameters<Services["listSandboxes"]>[1],
  ): Promise<Page<Sandbox>> {
    const wanted = [...this.sandboxes.values()].filter(
      (sandbox) =>
        sandbox.teamId === caller.teamId &&
        (input.statuses.length === 0
          ? sandbox.status !== "stopped" && sandbox.status !== "error"
          : input.statuses.includes(sandbox.status)) &&
        Object.entries(input.metadata).every(([key, value]) => sandbox.metadata[key] === value),
    );
    return page(wanted, input);
  }

  async getSandbox(caller: Caller, id: SandboxId): Promise<Sandbox> {
    const sandbox = this.sandboxes.get(id);
    if (sandbox?.teamId !== caller.teamId)
      throw new RookeryError("not_found", "there is no sandbox by this id");
    return sandbox;
  }

  async updateSandbox(
    caller: Caller,
    id: SandboxId,
    input: Parameters<Services["updateSandbox"]>[2],
  ): Promise<Sandbox> {
    const given = Object.fromEntries(Object.entries(input).filter(([, value]) => value !== undefined));
    return Object.assign(await this.getSandbox(caller, id), given);
  }

  /** Of every sandbox; the test sets them. `followEvents` gives these, then `endless` ones, or waits for its end. */
  events: FollowedEvent[] = [];
  endless: (() => FollowedEvent) | undefined;
  /** Streams that are open. */
  following = 0;

  async listSandboxEvents(
    caller: Caller,
    id: SandboxId,
    input: { limit: number; cursor?: string },
  ): Promise<Page<SandboxEvent>> {
    await this.getSandbox(caller, id);
    const events = this.events.flatMap((item) => (item.kind === "event" ? [item.event] : []));
    return { items: events.slice(0, input.limit) };
  }

  async followEvents(
    caller: Caller,
    { sandboxId, after = 0n }: FollowEventsInput,
    signal: AbortSignal,
  ): Promise<AsyncIterable<FollowedEvent> | undefined> {
    const sandbox = sandboxId && (await this.getSandbox(caller, sandboxId));
    const events = this.events.filter((item) => item.kind === "reset" || item.event.number > after);
    if (sandbox?.status === "stopped" && events.length === 0) return undefined;
    const { endless } = this;
    this.following++;
    signal.addEventListener("abort", () => this.following--, { once: true });
    return (async function* () {
      yield* events;
      if (endless) for (;;) yield endless();
      if (!signal.aborted) await once(signal, "abort");
    })();
  }

  pauseSandbox(caller: Caller, id: SandboxId): Promise<Sandbox> {
    return this.#move(caller, id, "running", "paused");
  }

  resumeSandbox(caller: Caller, id: SandboxId): Promise<Sandbox> {
    return this.#move(caller, id, "paused", "running");
  }

  async destroySandbox(caller: Caller, id: SandboxId): Promise<void> {
    const sandbox = await this.getSandbox(caller, id);
    sandbox.status = "stopped";
    sandbox.endedAt ??= new Date();
  }

  async pingSandbox(caller: Caller, id: SandboxId): Promise<void> {
    await this.#running(caller, id);
  }

  async exec(caller: Caller, id: SandboxId, input: ExecInput, signal: AbortSignal): Promise<ExecResult> {
    await this.#running(caller, id);
    return this.onExec(input, signal);
  }

  async writeFile(
    caller: Caller,
    id: SandboxId,
    path: string,
    content: AsyncIterable<Uint8Array>,
    signal: AbortSignal,
  ): Promise<void> {
    await this.#running(caller, id);
    const chunks: Uint8Array[] = [];
    for await (const chunk of content) {
      signal.throwIfAborted();
      chunks.push(Uint8Array.from(chunk));
    }
    signal.throwIfAborted();
    this.files.set(path, Buffer.concat(chunks));
  }

  async readFile(caller: Caller, id: SandboxId, path: string): ReturnType<Services["readFile"]> {
    await this.#running(caller, id);
    const bytes = this.files.get(path);
    if (bytes === undefined) throw new RookeryError("file_not_found", "there is no such file");
    return { sizeBytes: bytes.byteLength, content: chunksOf(bytes) };
  }

  async createSnapshot(caller: Caller, input: Parameters<Services["createSnapshot"]>[1]): Promise<Snapshot> {
    const sandbox = await this.getSandbox(caller, input.sandboxId);
    const old = this.#snapshotOf(caller, input.name);
    if (old !== undefined && !input.overwrite) throw new RookeryError("already_exists", "this name is taken");
    if (old !== undefined) this.#snapshots.delete(old.id);
    const snapshot = {
      id: newId("snap-") as SnapshotId,
      teamId: caller.teamId,
      name: input.name,
      vcpus: sandbox.vcpus,
      memoryMb: sandbox.memoryMb,
      diskMb: sandbox.diskMb,
      sizeBytes: 1024,
      createdAt: new Date(),
    };
    this.#snapshots.set(snapshot.id, snapshot);
    return snapshot;
  }

  async listSnapshots(caller: Caller, input: PageInput): Promise<Page<Snapshot>> {
    return page(
      [...this.#snapshots.values()].filter(({ teamId }) => teamId === caller.teamId),
      input,
    );
  }

  async deleteSnapshot(caller: Caller, name: string): Promise<void> {
    const snapshot = this.#snapshotOf(caller, name);
    if (snapshot === undefined) throw new RookeryError("not_found", "there is no such snapshot");
    this.#snapshots.delete(snapshot.id);
  }

  async listTemplates(caller: Caller, input: PageInput): Promise<Page<Template>> {
    const { items } = await this.listSnapshots(caller, { limit: 200 });
    return page<Template>(
      items.map((snapshot) => ({ ...snapshot, kind: "snapshot" as const })),
      input,
    );
  }

  async createApiKey(
    caller: Caller,
    { name, role }: { name: string; role: Role },
  ): Promise<{ apiKey: ApiKey; key: string }> {
    if (role === "platform" && caller.role !== "platform")
      throw new RookeryError("forbidden", "needs a platform key");
    const key = keyText("rk_");
    return { apiKey: this.#addKey(caller.teamId, name, key, role), key };
  }

  async listApiKeys(caller: Caller, input: PageInput): Promise<Page<ApiKey>> {
    return page(
      [...this.#apiKeys.values()].filter(({ teamId }) => teamId === caller.teamId),
      input,
    );
  }

  async deleteApiKey(caller: Caller, id: ApiKeyId): Promise<void> {
    if (this.#apiKeys.get(id)?.teamId !== caller.teamId)
      throw new RookeryError("not_found", "there is no such key");
    this.#apiKeys.delete(id);
    for (const [key, { keyId }] of this.#callers) if (keyId === id) this.#callers.delete(key);
  }

  async createTeam(_caller: Caller, { name }: { name: string }): ReturnType<Services["createTeam"]> {
    const key = keyText("rk_");
    return { ...this.#addTeam(name, key, "member"), key };
  }

  async listTeams(_caller: Caller, input: PageInput): Promise<Page<Team>> {
    return page([...this.#teams.values()], input);
  }

  async createHost(
    caller: Caller,
    input: Parameters<Services["createHost"]>[1],
  ): ReturnType<Services["createHost"]> {
    if (input.type === "shared" && caller.role !== "platform") {
      throw new RookeryError("forbidden", "needs a platform key");
    }
    const host: Host = {
      ...input,
      id: newId("host-") as HostId,
      ...(input.type === "byoc" ? { teamId: caller.teamId } : {}),
      status: "pending",
      sandboxes: 0,
      strangers: 0,
      strangersUntouched: false,
      createdAt: new Date(),
    };
    this.#hosts.set(host.id, host);
    return this.newRegistrationToken(caller, host.id);
  }

  async newRegistrationToken(caller: Caller, id: HostId): ReturnType<Services["newRegistrationToken"]> {
    const host = await this.getHost(caller, id);
    return { host, registrationToken: host.id, expiresAt: new Date(Date.now() + 3_600_000) };
  }

  async listHosts(caller: Caller, input: PageInput): Promise<Page<Host>> {
    return page(
      [...this.#hosts.values()].filter((host) => isVisible(host, caller)),
      input,
    );
  }

  async getHost(caller: Caller, id: HostId): Promise<Host> {
    const host = this.#hosts.get(id);
    if (host === undefined || !isVisible(host, caller))
      throw new RookeryError("not_found", "there is no such host");
    return host;
  }

  async countStrangers(): ReturnType<Services["countStrangers"]> {
    const hosts = [...this.#hosts.values()];
    return {
      sandboxes: hosts.reduce((sum, { strangers }) => sum + strangers, 0),
      untouchedHosts: hosts.filter(({ strangersUntouched }) => strangersUntouched).length,
    };
  }

  async updateHost(caller: Caller, id: HostId, input: Parameters<Services["updateHost"]>[2]): Promise<Host> {
    const host = await this.getHost(caller, id);
    if (input.name !== undefined) host.name = input.name;
    if (input.labels !== undefined) host.labels = input.labels;
    return host;
  }

  async setHostDraining(caller: Caller, id: HostId, draining: boolean): Promise<Host> {
    const host = await this.getHost(caller, id);
    host.status = draining ? "draining" : "online";
    return host;
  }

  async revokeHost(caller: Caller, id: HostId): Promise<Host> {
    const host = await this.getHost(caller, id);
    Object.assign(host, { status: "unreachable", revokedAt: new Date() });
    return host;
  }

  /** All sandboxes there are: the fake ones are on no host. */
  async previewHostDeletion(caller: Caller, id: HostId): ReturnType<Services["previewHostDeletion"]> {
    await this.getHost(caller, id);
    const sandboxes = [...this.sandboxes.values()].filter(({ status }) => !isFinal(status));
    return { sandboxes, sandboxCount: sandboxes.length, snapshots: [], snapshotCount: 0 };
  }

  async deleteHost(caller: Caller, id: HostId, { force }: { force: boolean }): Promise<void> {
    const { sandboxes } = await this.previewHostDeletion(caller, id);
    if (!force && sandboxes.length > 0) {
      const listed = sandboxes.map((sandbox) => ({ id: sandbox.id }));
      throw new RookeryError("host_has_sandboxes", "it has some", { details: { sandboxes: listed } });
    }
    this.#hosts.delete(id);
  }

  async registerHost({
    token,
    certificateFingerprint: _fingerprint,
    publicKey: _publicKey,
    ...facts
  }: Parameters<Services["registerHost"]>[0]): ReturnType<Services["registerHost"]> {
    const host = this.#hosts.get(token as HostId);
    if (host === undefined) throw new RookeryError("invalid_token", "this registration token is not good");
    Object.assign(host, facts, { status: "online" });
    return {
      hostId: host.id,
      clusterId: "cluster",
      accessToken: `access-${host.id}`,
      refreshToken: `refresh-${host.id}`,
      controlPlaneKey: "MCowBQYDK2VwAyEA",
    };
  }

  async heartbeat(
    accessToken: string,
    id: HostId,
    input: Parameters<Services["heartbeat"]>[2],
  ): ReturnType<Services["heartbeat"]> {
    const host = this.#hosts.get(id);
    if (host === undefined || accessToken !== `access-${id}`) {
      throw new RookeryError("invalid_token", "this access token is not good");
    }
    host.lastHeartbeatAt = new Date();
    return { acknowledgedEvent: input.lastEventNumber };
  }

  async refreshHostTokens(refreshToken: string): ReturnType<Services["refreshHostTokens"]> {
    const id = refreshToken.replace(/^refresh-/, "") as HostId;
    if (!this.#hosts.has(id)) throw new RookeryError("invalid_token", "this refresh token is not good");
    return { accessToken: `access-${id}`, refreshToken };
  }

  async #running(caller: Caller, id: SandboxId): Promise<Sandbox> {
    this.#mayFail();
    return this.#inState(await this.getSandbox(caller, id), "running");
  }

  async #move(caller: Caller, id: SandboxId, from: SandboxStatus, to: SandboxStatus): Promise<Sandbox> {
    const sandbox = this.#inState(await this.getSandbox(caller, id), from);
    sandbox.status = to;
    return sandbox;
  }

  #inState(sandbox: Sandbox, wanted: SandboxStatus): Sandbox {
    if (sandbox.status === wanted) return sandbox;
    throw new RookeryError("wrong_state", `the sandbox is ${sandbox.status}, not ${wanted}`, {
      details: { status: sandbox.status },
    });
  }

  #snapshotOf(caller: Caller, name: string): Owned<Snapshot> | undefined {
    return [...this.#snapshots.values()].find((one) => one.teamId === caller.teamId && one.name === name);
  }

  #addTeam(name: string, key: string, role: Role): { team: Team; apiKey: ApiKey } {
    const team = { id: newId("team-") as TeamId, name, createdAt: new Date() };
    this.#teams.set(team.id, team);
    return { team, apiKey: this.#addKey(team.id, name, key, role) };
  }

  #addKey(teamId: TeamId, name: string, key: string, role: Role): ApiKey {
    const id = newId("key-") as ApiKeyId;
    const apiKey: ApiKey = { id, teamId, name, role, prefix: key.slice(0, 8), createdAt: new Date() };
    this.#apiKeys.set(id, apiKey);
    this.#callers.set(key, { keyId: id, teamId, role });
    return apiKey;
  }

  #mayFail(): void {
    if (this.failure !== undefined) throw this.failure;
  }
}

export function output({
  stdout = "",
  stderr = "",
  ...rest
}: Partial<Omit<ExecResult, "stdout" | "stderr">> & {
  stdout?: string | Uint8Array;
  stderr?: string | Uint8Array;
}): ExecResult {
  return {
    stdout: Buffer.from(stdout),
    stderr: Buffer.from(stderr),
    exitCode: 0,
    timedOut: false,
    truncated: false,
    durationMs: 1,
    ...rest,
  };
}

async function* chunksOf(bytes: Uint8Array): AsyncGenerator<Uint8Array> {
  for (let at = 0; at < bytes.byteLength; at += 65_536) yield bytes.subarray(at, at + 65_536);
}

function isVisible(host: Host, caller: Caller): boolean {
  return caller.role === "platform" || host.teamId === caller.teamId;
}

function newId(prefix: string, length = 20): string {
  return prefix + randomBytes(length).toString("hex").slice(0, length);
}

function keyText(prefix: string): string {
  return prefix + randomBytes(20).toString("hex");
}
