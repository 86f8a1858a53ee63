/**
 * Watching a running sandbox's VM: its end by itself fails the sandbox.
 */
import { RookeryError } from "@rookery/protocol/errors";
import type { PlacedVm } from "../vm-pool/vm-pool.ts";
import type { VmExit } from "../vmm/vmm.ts";
import type { Core, SandboxEntry } from "./core.ts";

export function watchVm(
  core: Core,
  entry: SandboxEntry,
  placed: PlacedVm,
  onEnd: (exit: VmExit) => Promise<void>,
): void {
  void placed.vm.exited.then(async (exit) => {
    if (entry.placed !== placed) return;
    entry.endUses(new RookeryError("guest_error", `the guest has ended: ${exit.message}`));
    try {
      await entry.queue.runOwn(async () => {
        // An operation at work meanwhile may have ended it (pause), or has let it go.
        if (entry.placed === placed && entry.phase === "running") await onEnd(exit);
      });
    } catch (cause) {
      core.deps.logger.error({ sandboxId: entry.id, err: cause }, "the end of a VM was not dealt with");
      entry.unfinished = true;
    }
  });
}
