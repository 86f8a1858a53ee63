/** envd of simulated guests, as far as callers' commands need it: one that notes words in the guest's memory. */
import { RookeryError } from "@rookery/protocol/errors";
import type { ServiceDeps } from "../../../packages/host-agent/src/rpc/service.ts";
import type { ProcessTable } from "../../../packages/host-agent/src/vmm/simulated-processes.ts";

const NONE = new Uint8Array();

export function simulatedEnvd(processes: ProcessTable): ServiceDeps["envd"] {
  const unsupported = (): never => {
    throw new RookeryError("guest_error", "a simulated guest has no such program");
  };
  return {
    async exec(target, { args }) {
      const found = processes
        .all()
        .find(
          ({ place: { nic }, state }) =>
            state === "running" && nic.kind === "user" && nic.forwards[0]?.hostPort === target.port,
        );
      const { sandboxId = "", accessToken } = found?.guest.memory ?? {};
      if (found === undefined || accessToken !== target.accessToken) {
        throw new RookeryError("guest_error", "nobody answers");
      }
      // In one go: what the guest answers, it has done.
      const memory = { ...found.guest.memory, [`note-${args[0] ?? ""}`]: sandboxId };
      processes.set({ ...found, guest: { ...found.guest, memory } });
      return {
        stdout: Buffer.from(sandboxId),
        stderr: NONE,
        exitCode: 0,
        signal: undefined,
        timedOut: false,
        truncated: false,
        durationMs: 0,
      };
    },
    execStream: unsupported,
    writeFile: async () => unsupported(),
    readFile: unsupported,
  };
}
