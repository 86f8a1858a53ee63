/** Messages of the host agent's protocol ⇄ the model's words. */
import { RookeryError } from "@rookery/protocol/errors";
import {
  type HostEvent,
  type Sandbox as WireSandbox,
  SandboxPhase,
  TimeoutAction,
  TimeoutMode,
} from "@rookery/protocol/hostagent";
import { type SandboxId, isSandboxId } from "../model/ids.ts";
import type { Lifetime } from "../model/sandbox.ts";
import type { AgentCommand, AgentEvent, AgentOperation, AgentPhase, AgentSandbox } from "./host-agent.ts";

const PHASES: Record<SandboxPhase, AgentPhase | undefined> = {
  [SandboxPhase.UNSPECIFIED]: undefined,
  [SandboxPhase.STARTING]: "starting",
  [SandboxPhase.RUNNING]: "running",
  [SandboxPhase.PAUSING]: "pausing",
  [SandboxPhase.PAUSED]: "paused",
  [SandboxPhase.RESUMING]: "resuming",
  [SandboxPhase.STOPPING]: "stopping",
  [SandboxPhase.FAILED]: "failed",
};

export function toOperation(operation: AgentOperation, clusterId: string) {
  return {
    sandboxId: operation.sandboxId,
    generation: operation.generation,
    deadlineUnixMs: BigInt(operation.deadline.getTime()),
    clusterId,
  };
}

export function toLifetime(lifetime: Lifetime) {
  return {
    timeoutSec: lifetime.timeoutSec,
    onTimeout: lifetime.onTimeout === "pause" ? TimeoutAction.PAUSE : TimeoutAction.DESTROY,
    mode: lifetime.timeoutMode === "idle" ? TimeoutMode.IDLE : TimeoutMode.ABSOLUTE,
  };
}

export function toCommand(command: AgentCommand) {
  const { cmd, args, shell, cwd, env, user, stdin, timeoutMs } = command;
  return { cmd, args: [...args], shell, cwd, env, user, stdin, timeoutMs };
}

export function fromSandbox(wire: WireSandbox | undefined): AgentSandbox {
  const phase = wire && PHASES[wire.phase];
  // A newer agent may know phases that we don't.
  if (!wire || !phase) throw new RookeryError("host_error", "The host's answer makes no sense.");
  return {
    id: fromId(wire.sandboxId),
    phase,
    strangerForMs: wire.strangerForMs === undefined ? undefined : Number(wire.strangerForMs),
    generation: wire.generation,
    vcpus: wire.vcpus,
    memoryMb: wire.memoryMb,
    diskMb: wire.diskMb,
    startedAt: fromTime(wire.startedAtUnixMs),
    expiresAt: fromTime(wire.expiresAtUnixMs),
    diskUsedBytes: Number(wire.diskUsedBytes),
    exit:
      phase === "failed"
        ? { code: shownReason(wire.exitCode), message: shownMessage(wire.exitMessage) }
        : undefined,
  };
}

function fromId(text: string): SandboxId {
  if (!isSandboxId(text)) throw new RookeryError("host_error", "The host names what is no sandbox.");
  return text;
}

export function fromTime(unixMs: bigint): Date | undefined {
  return unixMs === 0n ? undefined : new Date(Number(unixMs));
}

export function fromEvent(wire: HostEvent): AgentEvent {
  const { number, sandboxId, generation, kind, reason, message } = wire;
  return {
    number,
    // One that makes no sense must not hold up those after it.
    sandboxId: isSandboxId(sandboxId) ? sandboxId : undefined,
    generation,
    kind,
    reason: shownReason(reason),
    message: shownMessage(message),
  };
}

const MAX_MESSAGE_LENGTH = 1_000;

/** Words of a host that go into rows and answers: short, and storable. */
const shownReason = (text: string): string => (/^[a-z][a-z0-9_]{0,63}$/.test(text) ? text : "");
const shownMessage = (text: string): string =>
  text.slice(0, MAX_MESSAGE_LENGTH).replaceAll("\0", "").toWellFormed();
