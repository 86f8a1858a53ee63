/** Our types → answers. */
import { create } from "@bufbuild/protobuf";
import type { MessageInitShape } from "@bufbuild/protobuf";
import type { ExecStreamResponseSchema, HostEventSchema } from "@rookery/protocol/hostagent";
import { SandboxPhase, SandboxSchema, TimeoutAction, TimeoutMode } from "@rookery/protocol/hostagent";
import type { Sandbox } from "@rookery/protocol/hostagent";
import type { CommandEvent } from "../guest/commands.ts";
import type { HostEvent, SandboxView } from "../sandbox-manager/sandbox.ts";

const PHASES: Record<SandboxView["phase"], SandboxPhase> = {
  starting: SandboxPhase.STARTING,
  running: SandboxPhase.RUNNING,
  pausing: SandboxPhase.PAUSING,
  paused: SandboxPhase.PAUSED,
  resuming: SandboxPhase.RESUMING,
  stopping: SandboxPhase.STOPPING,
  failed: SandboxPhase.FAILED,
};

export function sandboxMessage(view: SandboxView): Sandbox {
  return create(SandboxSchema, {
    sandboxId: view.id,
    phase: PHASES[view.phase],
    generation: view.generation,
    vcpus: view.vcpus,
    memoryMb: view.memoryMb,
    diskMb: view.diskMb,
    lifetime: {
      timeoutSec: view.lifetime.timeoutSec,
      onTimeout: view.lifetime.onTimeout === "pause" ? TimeoutAction.PAUSE : TimeoutAction.DESTROY,
      mode: view.lifetime.mode === "idle" ? TimeoutMode.IDLE : TimeoutMode.ABSOLUTE,
    },
    expiresAtUnixMs: int64(view.expiresAtUnixMs),
    diskUsedBytes: int64(view.diskUsedBytes),
    exitCode: view.exit?.code ?? "",
    exitMessage: view.exit?.message ?? "",
    startedAtUnixMs: int64(view.startedAtUnixMs),
    inMemory: view.inMemory,
    ...(view.strangerForMs !== undefined && { strangerForMs: int64(view.strangerForMs) }),
  });
}

export function hostEventMessage(event: HostEvent): MessageInitShape<typeof HostEventSchema> {
  return { ...event, occurredAtUnixMs: int64(event.occurredAtUnixMs) };
}

export function commandEventMessage(event: CommandEvent): MessageInitShape<typeof ExecStreamResponseSchema> {
  switch (event.kind) {
    case "start":
      return { event: { case: "start", value: { pid: event.pid } } };
    case "end": {
      const { exitCode, signal, timedOut } = event;
      return { event: { case: "end", value: { exitCode, signal, timedOut } } };
    }
    default:
      return { event: { case: event.kind, value: event.data } };
  }
}

export function int64(value: number): bigint {
  return BigInt(Math.trunc(value));
}
