/**
 * Requests → trusted types. Behind this file nobody checks again.
 *
 * A malformed id is an unknown one (`not_found`); all else that breaks a rule
 * is `invalid_request` with the field's name.
 */
import type {
  Command as WireCommand,
  CreateSandboxRequest,
  CreateSnapshotRequest,
  Lifetime as WireLifetime,
  Operation as WireOperation,
} from "@rookery/protocol/hostagent";
import { TimeoutAction, TimeoutMode } from "@rookery/protocol/hostagent";
import { RookeryError } from "@rookery/protocol/errors";
import type { Command } from "../guest/process-calls.ts";
import type { SandboxId, SnapshotId } from "../ids.ts";
import type { Lifetime, Operation, SandboxSource, SandboxSpec } from "../sandbox-manager/sandbox.ts";
import type { Clock } from "../sandbox-manager/clock.ts";

const isSandboxId = (text: string): text is SandboxId => /^sb[a-z0-9]{18}$/.test(text);
const isSnapshotId = (text: string): text is SnapshotId => /^snap-[a-z0-9]{20}$/.test(text);
const TEAM_ID = /^[a-z0-9][a-z0-9-]{0,63}$/;
const IMAGE_NAME = /^[a-z0-9][a-z0-9._-]{0,62}$/;
const TOKEN = /^[\x21-\x7e]{1,512}$/;
const USER = /^[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}$/;
const ENV_NAME = /^[^=\0]{1,128}$/;

const VCPUS = [1, 2, 4, 8];
const MEMORY_MB = [256, 512, 1024, 2048, 4096, 8192, 16384];
const MAX_DISK_MB = 65_536;
const MAX_TIMEOUT_SEC = 604_800;
const MAX_ENTRIES = 64;
const MAX_SNAPSHOT_IDS = 1_000;
const MAX_ENV_VALUE = 4_096;
const MAX_CMD_BYTES = 128 << 10;
const MAX_ARGS = 1_024;
const MAX_ARGS_BYTES = 1 << 20;
const MAX_PATH_BYTES = 4_096;
const DEFAULT_OUTPUT_BYTES = 4 << 20;
const MAX_OUTPUT_BYTES = 16 << 20;
const DEFAULT_LIST = 1_000;
const MAX_LIST = 1_000;
/** A deadline farther away than this is a mistake of clocks or units. */
const MAX_DEADLINE_MS = 24 * 3_600_000;

export interface Border {
  clusterId: string;
  clock: Clock;
}

export function sandboxId(text: string): SandboxId {
  if (!isSandboxId(text)) throw new RookeryError("not_found", "No such sandbox");
  return text;
}

export function snapshotId(text: string): SnapshotId {
  if (!isSnapshotId(text)) throw new RookeryError("not_found", "No such snapshot");
  return text;
}

export function assertCluster(clusterId: string, border: Border): void {
  if (clusterId !== border.clusterId) {
    throw new RookeryError("forbidden", "This host belongs to another cluster");
  }
}

export function operation(wire: WireOperation | undefined, border: Border): Operation {
  if (wire === undefined) throw invalid("operation", "is required");
  assertCluster(wire.clusterId, border);
  if (wire.generation < 0n) throw invalid("operation.generation", "must not be negative");
  const now = BigInt(Math.trunc(border.clock.nowMs()));
  if (wire.deadlineUnixMs <= now) throw new RookeryError("timeout", "The operation's deadline has passed");
  if (wire.deadlineUnixMs > now + BigInt(MAX_DEADLINE_MS)) {
    throw invalid("operation.deadline_unix_ms", "is more than a day away");
  }
  return {
    sandboxId: sandboxId(wire.sandboxId),
    generation: wire.generation,
    deadlineUnixMs: Number(wire.deadlineUnixMs),
  };
}

export function lifetime(wire: WireLifetime | undefined): Lifetime {
  if (wire === undefined) throw invalid("lifetime", "is required");
  if (wire.timeoutSec > MAX_TIMEOUT_SEC) {
    throw invalid("lifetime.timeout_sec", `must be at most ${MAX_TIMEOUT_SEC}`);
  }
  return {
    timeoutSec: wire.timeoutSec,
    onTimeout: one(wire.onTimeout, "lifetime.on_timeout", {
      [TimeoutAction.PAUSE]: "pause",
      [TimeoutAction.DESTROY]: "destroy",
    }),
    mode: one(wire.mode, "lifetime.mode", { [TimeoutMode.IDLE]: "idle", [TimeoutMode.ABSOLUTE]: "absolute" }),
  };
}

export function sandboxSpec(wire: CreateSandboxRequest): SandboxSpec {
  const { vcpus, memoryMb, diskMb } = wire;
  if (!VCPUS.includes(vcpus)) throw shape("vcpus", `must be one of ${VCPUS.join(", ")}`);
  if (!MEMORY_MB.includes(memoryMb)) throw shape("memory_mb", `must be one of ${MEMORY_MB.join(", ")}`);
  if (diskMb < 1 || diskMb > MAX_DISK_MB) throw shape("disk_mb", `must be 1 to ${MAX_DISK_MB}`);
  return {
    id: sandboxId(wire.operation?.sandboxId ?? ""),
    teamId: teamId(wire.teamId),
    source: source(wire.source),
    vcpus,
    memoryMb,
    diskMb,
    lifetime: lifetime(wire.lifetime),
    env: environment(wire.env),
    envdAccessToken: matching(wire.envdAccessToken, TOKEN, "envd_access_token"),
  };
}

/** Those that no snapshot can have are of none here. */
export function snapshotIds(ids: readonly string[]): SnapshotId[] {
  if (ids.length > MAX_SNAPSHOT_IDS) throw invalid("snapshot_ids", `must be at most ${MAX_SNAPSHOT_IDS}`);
  return ids.filter(isSnapshotId);
}

export function snapshotRequest(wire: CreateSnapshotRequest): { snapshotId: SnapshotId; teamId: string } {
  const { snapshotId } = wire;
  if (!isSnapshotId(snapshotId)) throw invalid("snapshot_id", "is not an id of a snapshot");
  return { snapshotId, teamId: teamId(wire.teamId) };
}

export function listRequest(wire: { afterSandboxId: string; limit: number }): {
  after?: SandboxId;
  limit: number;
} {
  const limit = wire.limit === 0 ? DEFAULT_LIST : Math.min(wire.limit, MAX_LIST);
  return wire.afterSandboxId === "" ? { limit } : { after: sandboxId(wire.afterSandboxId), limit };
}

export function command(wire: WireCommand | undefined): Command {
  if (wire === undefined) throw invalid("command", "is required");
  if (wire.cmd === "") throw invalid("command.cmd", "must not be empty");
  assertText(wire.cmd, "command.cmd", MAX_CMD_BYTES);
  if (wire.args.length > MAX_ARGS) throw invalid("command.args", `must be at most ${MAX_ARGS}`);
  let argsBytes = 0;
  for (const arg of wire.args) {
    argsBytes += Buffer.byteLength(arg);
    assertText(arg, "command.args", MAX_ARGS_BYTES);
  }
  if (argsBytes > MAX_ARGS_BYTES) throw invalid("command.args", `must be at most ${MAX_ARGS_BYTES} bytes`);
  return {
    cmd: wire.cmd,
    args: wire.args,
    shell: wire.shell,
    cwd: wire.cwd === undefined ? undefined : path(wire.cwd, "command.cwd"),
    env: environment(wire.env),
    user: user(wire.user, "command.user"),
    stdin: wire.stdin,
    timeoutMs: wire.timeoutMs,
  };
}

export function maxOutputBytes(wire: number): number {
  if (wire > MAX_OUTPUT_BYTES) throw invalid("max_output_bytes", `must be at most ${MAX_OUTPUT_BYTES}`);
  return wire === 0 ? DEFAULT_OUTPUT_BYTES : wire;
}

export function fileTarget(wire: { path: string; user?: string | undefined }): {
  path: string;
  user: string | undefined;
} {
  if (wire.path === "") throw new RookeryError("invalid_path", "The path is empty");
  return { path: path(wire.path, "path"), user: user(wire.user, "user") };
}

function path(text: string, field: string): string {
  if (text.includes("\0")) throw new RookeryError("invalid_path", `${field} holds a NUL`);
  if (Buffer.byteLength(text) > MAX_PATH_BYTES) {
    throw new RookeryError("invalid_path", `${field} is longer than ${MAX_PATH_BYTES} bytes`);
  }
  return text;
}

function user(text: string | undefined, field: string): string | undefined {
  return text === undefined ? undefined : matching(text, USER, field);
}

function environment(env: Readonly<Record<string, string>>): Record<string, string> {
  const entries = Object.entries(env);
  if (entries.length > MAX_ENTRIES) throw invalid("env", `must have at most ${MAX_ENTRIES} entries`);
  for (const [name, value] of entries) {
    if (!ENV_NAME.test(name))
      throw invalid("env", "has a name that is empty, too long, or holds `=` or a NUL");
    if (value.length > MAX_ENV_VALUE || value.includes("\0")) {
      throw invalid(`env.${name}`, `must be at most ${MAX_ENV_VALUE} characters without NUL`);
    }
  }
  return { ...env };
}

function source(wire: CreateSandboxRequest["source"]): SandboxSource {
  switch (wire.case) {
    case "image":
      if (!IMAGE_NAME.test(wire.value)) throw new RookeryError("template_not_found", "No such template");
      return { kind: "image", name: wire.value };
    case "snapshotId":
      if (!isSnapshotId(wire.value)) throw new RookeryError("template_not_found", "No such snapshot");
      return { kind: "snapshot", snapshotId: wire.value };
    default:
      throw invalid("source", "is required");
  }
}

function teamId(text: string): string {
  return matching(text, TEAM_ID, "team_id");
}

function matching(text: string, pattern: RegExp, field: string): string {
  if (!pattern.test(text)) throw invalid(field, "is malformed");
  return text;
}

function assertText(text: string, field: string, maxBytes: number): void {
  if (text.includes("\0")) throw invalid(field, "must not hold a NUL");
  if (Buffer.byteLength(text) > maxBytes) throw invalid(field, `must be at most ${maxBytes} bytes`);
}

function one<T>(value: number, field: string, names: Readonly<Record<number, T>>): T {
  const name = Object.hasOwn(names, value) ? names[value] : undefined;
  if (name === undefined) throw invalid(field, "is not set");
  return name;
}

function invalid(field: string, reason: string): RookeryError {
  return new RookeryError("invalid_request", `${field} ${reason}`, { details: { field, reason } });
}

function shape(field: string, reason: string): RookeryError {
  return new RookeryError("unsupported_shape", `${field} ${reason}`, { details: { field, reason } });
}
