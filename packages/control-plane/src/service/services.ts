/**
 * The use cases that every front end shares. `api/` calls these and nothing
 * else; each is one file beside this one, put together by `open-services.ts`.
 *
 * All of them throw RookeryErrors with a code of the error table. What belongs
 * to another team is `not_found`. Every `signal` is the caller's: when it
 * aborts, waiting ends; an accepted change of state goes on to its end.
 */
import type { ApiKeyId, HostId, SandboxId, SnapshotId, TeamId, TemplateId } from "../model/ids.ts";
import type { Lifetime, Sandbox, SandboxStatus, SandboxSummary } from "../model/sandbox.ts";
import type { Answer, Creation, HeldKey } from "./idempotent.ts";

export type { Answer, Creation, HeldKey } from "./idempotent.ts";

export type Role = "member" | "platform";

/** Who calls: read from an API key, once per request. */
export interface Caller {
  keyId: ApiKeyId;
  teamId: TeamId;
  role: Role;
}

export interface Page<T> {
  items: T[];
  nextCursor?: string;
}

export interface CreateSandboxInput extends Lifetime {
  template: string;
  /** Absent: the snapshot's own, or the template's defaults. */
  vcpus?: number;
  memoryMb?: number;
  diskMb?: number;
  env: Record<string, string>;
  metadata: Record<string, string>;
}

export interface ListSandboxesInput {
  /** Empty: all that are not final. */
  statuses: readonly SandboxStatus[];
  metadata: Readonly<Record<string, string>>;
  limit: number;
  cursor?: string;
}

export interface UpdateSandboxInput extends Partial<Lifetime> {
  /** Replaces all of it. */
  metadata?: Record<string, string>;
}

export interface ExecInput {
  cmd: string;
  args: readonly string[];
  shell: boolean;
  cwd?: string;
  env: Readonly<Record<string, string>>;
  user?: string;
  stdin?: Uint8Array;
  timeoutSec: number;
}

export interface ExecResult {
  stdout: Uint8Array;
  stderr: Uint8Array;
  exitCode: number;
  signal?: string;
  timedOut: boolean;
  truncated: boolean;
  durationMs: number;
}

/** One change of a sandbox's status. */
export interface SandboxEvent {
  /** Counts the team's events, without gaps. */
  number: bigint;
  sandboxId: SandboxId;
  /** Absent: it came into being. */
  previousStatus?: SandboxStatus;
  status: SandboxStatus;
  /** Why, where nobody asked for it. */
  reason?: string;
  error?: { code: string; message: string };
  hostId?: HostId;
  createdAt: Date;
}

export interface FollowEventsInput {
  sandboxId?: SandboxId;
  /** The last event that was read; absent: a sandbox's from the oldest on, a team's from now on. */
  after?: bigint;
}

export type FollowedEvent =
  | { kind: "event"; event: SandboxEvent }
  /** Events were lost to the reader: too old to be kept, or of another database. It goes on after `after`. */
  | { kind: "reset"; after: bigint };

export interface Snapshot {
  id: SnapshotId;
  name: string;
  vcpus: number;
  memoryMb: number;
  diskMb: number;
  sizeBytes: number;
  createdAt: Date;
}

export interface Template {
  id: TemplateId | SnapshotId;
  name: string;
  kind: "platform" | "snapshot";
  vcpus: number;
  memoryMb: number;
  diskMb: number;
  createdAt: Date;
}

export interface ApiKey {
  id: ApiKeyId;
  teamId: TeamId;
  name: string;
  role: Role;
  /** First 8 characters, for display. */
  prefix: string;
  createdAt: Date;
  lastUsedAt?: Date;
}

/** `key` is shown once. */
export interface NewApiKey {
  apiKey: ApiKey;
  key: string;
}

export interface Team {
  id: TeamId;
  name: string;
  createdAt: Date;
}

export interface NewTeam extends NewApiKey {
  team: Team;
}

export type HostStatus = "pending" | "online" | "unreachable" | "draining";

export interface Host {
  id: HostId;
  name: string;
  type: "shared" | "byoc";
  teamId?: TeamId;
  status: HostStatus;
  address?: string;
  arch?: string;
  cpus?: number;
  memoryMb?: number;
  diskMb?: number;
  drivers?: Readonly<Record<string, string>>;
  version?: string;
  labels: Readonly<Record<string, string>>;
  /** Sandboxes of it that are not final. */
  sandboxes: number;
  /** Sandboxes on it that no row knows; and whether they were too many to touch any. */
  strangers: number;
  strangersUntouched: boolean;
  lastHeartbeatAt?: Date;
  /** Its credentials were revoked, and it has not registered since. */
  revokedAt?: Date;
  createdAt: Date;
}

/** `registrationToken` is shown once. */
export interface HostInvitation {
  host: Host;
  registrationToken: string;
  expiresAt: Date;
}

export interface UpdateHostInput {
  name?: string;
  /** Replaces all of them. */
  labels?: Record<string, string>;
}

/** What a forced deletion ends: the first of each kind, and how many there are. */
export interface HostContents {
  sandboxes: { id: SandboxId; teamId: TeamId; status: SandboxStatus }[];
  sandboxCount: number;
  /** Those that are nowhere else. */
  snapshots: { id: SnapshotId; teamId: TeamId; name: string; sizeBytes: number }[];
  snapshotCount: number;
}

export interface RegisterHostInput {
  token: string;
  /** That the agent has the key: makes a token that it spent good again, until its answer was used. */
  proof?: string;
  address: string;
  /** SHA-256 of the agent's certificate (DER), 64 hex; absent: plain HTTP, loopback only. */
  certificateFingerprint?: string;
  /** Ed25519 public key of the agent, SPKI in base64. */
  publicKey: string;
  arch: string;
  cpus: number;
  memoryMb: number;
  diskMb: number;
  drivers: Record<string, string>;
  version: string;
}

export interface Registration {
  hostId: HostId;
  clusterId: string;
  accessToken: string;
  refreshToken: string;
  /** Ed25519 public key (SPKI, base64) that proves the control plane to the agent. */
  controlPlaneKey: string;
}

export interface HeartbeatInput {
  load: { cpus: number; memoryMbUsed: number; diskMbFree: number; sandboxes: number };
  /** Digest of the agent's sandbox set; see docs. */
  digest: string;
  eventLogId: string;
  lastEventNumber: bigint;
  /** Absent: an agent that shares no snapshots. */
  snapshots?: { compat: string; storeId?: string | undefined } | undefined;
}

export interface Services {
  /** Accepts `rk_` and `e2b_` + 40 hex. Throws `unauthenticated`. */
  authenticate(presentedKey: string): Promise<Caller>;
  /** Database reachable, migrations done; throws `unavailable`. */
  checkReady(): Promise<void>;

  /**
   * Makes what `creation` makes once per (team, key) for 24 h, also under
   * concurrency and when a replica dies in the middle: the same key and
   * fingerprint get the stored answer, another fingerprint `idempotency_mismatch`.
   * `creation.make` hands the key that it is given on to the use case.
   */
  idempotent<Made>(
    caller: Caller,
    key: string,
    fingerprint: string,
    creation: Creation<Made>,
  ): Promise<Answer>;

  createSandbox(caller: Caller, input: CreateSandboxInput, held?: HeldKey<Sandbox>): Promise<Sandbox>;
  listSandboxes(caller: Caller, input: ListSandboxesInput): Promise<Page<SandboxSummary>>;
  getSandbox(caller: Caller, id: SandboxId): Promise<Sandbox>;
  updateSandbox(caller: Caller, id: SandboxId, input: UpdateSandboxInput): Promise<Sandbox>;
  pauseSandbox(caller: Caller, id: SandboxId): Promise<Sandbox>;
  resumeSandbox(caller: Caller, id: SandboxId): Promise<Sandbox>;
  destroySandbox(caller: Caller, id: SandboxId): Promise<void>;
  pingSandbox(caller: Caller, id: SandboxId): Promise<void>;

  /** Newest first. */
  listSandboxEvents(
    caller: Caller,
    id: SandboxId,
    input: { limit: number; cursor?: string },
  ): Promise<Page<SandboxEvent>>;
  /**
   * Events of the caller's team, or of one sandbox of it, as they happen, until
   * `signal` aborts: it frees what the stream holds, so whoever opened it aborts it
   * in the end. Undefined: that sandbox has ended, and all of it has been read.
   */
  followEvents(
    caller: Caller,
    input: FollowEventsInput,
    signal: AbortSignal,
  ): Promise<AsyncIterable<FollowedEvent> | undefined>;

  exec(caller: Caller, id: SandboxId, input: ExecInput, signal: AbortSignal): Promise<ExecResult>;
  writeFile(
    caller: Caller,
    id: SandboxId,
    path: string,
    content: AsyncIterable<Uint8Array>,
    signal: AbortSignal,
  ): Promise<void>;
  readFile(
    caller: Caller,
    id: SandboxId,
    path: string,
    signal: AbortSignal,
  ): Promise<{ sizeBytes?: number; content: AsyncIterable<Uint8Array> }>;

  createSnapshot(
    caller: Caller,
    input: { sandboxId: SandboxId; name: string; overwrite: boolean },
    held?: HeldKey<Snapshot>,
  ): Promise<Snapshot>;
  listSnapshots(caller: Caller, input: { limit: number; cursor?: string }): Promise<Page<Snapshot>>;
  deleteSnapshot(caller: Caller, name: string): Promise<void>;
  listTemplates(caller: Caller, input: { limit: number; cursor?: string }): Promise<Page<Template>>;

  /** `key` is shown once. */
  createApiKey(
    caller: Caller,
    input: { name: string; role: Role },
    held?: HeldKey<NewApiKey>,
  ): Promise<NewApiKey>;
  listApiKeys(caller: Caller, input: { limit: number; cursor?: string }): Promise<Page<ApiKey>>;
  deleteApiKey(caller: Caller, id: ApiKeyId): Promise<void>;
  /** With its first platform-less key, shown once. Platform callers only. */
  createTeam(caller: Caller, input: { name: string }, held?: HeldKey<NewTeam>): Promise<NewTeam>;
  listTeams(caller: Caller, input: { limit: number; cursor?: string }): Promise<Page<Team>>;

  createHost(
    caller: Caller,
    input: { name: string; type: "shared" | "byoc"; labels: Record<string, string> },
    held?: HeldKey<HostInvitation>,
  ): Promise<HostInvitation>;
  newRegistrationToken(caller: Caller, id: HostId): Promise<HostInvitation>;
  listHosts(caller: Caller, input: { limit: number; cursor?: string }): Promise<Page<Host>>;
  getHost(caller: Caller, id: HostId): Promise<Host>;
  /** Over all hosts; for figures, so it is nobody's request. */
  countStrangers(): Promise<{ sandboxes: number; untouchedHosts: number }>;
  updateHost(caller: Caller, id: HostId, input: UpdateHostInput): Promise<Host>;
  /** A draining host takes no new sandboxes; what it has stays. */
  setHostDraining(caller: Caller, id: HostId, draining: boolean): Promise<Host>;
  /** Cuts its agent off until it registers anew; its running sandboxes are `missing`. */
  revokeHost(caller: Caller, id: HostId): Promise<Host>;
  previewHostDeletion(caller: Caller, id: HostId): Promise<HostContents>;
  /** Without `force`, `host_has_sandboxes` where anything would end with it. */
  deleteHost(caller: Caller, id: HostId, options: { force: boolean }): Promise<void>;

  /** These three are called by agents: their proof is the token itself. */
  registerHost(input: RegisterHostInput): Promise<Registration>;
  heartbeat(accessToken: string, id: HostId, input: HeartbeatInput): Promise<{ acknowledgedEvent: bigint }>;
  refreshHostTokens(refreshToken: string): Promise<{ accessToken: string; refreshToken: string }>;
}
