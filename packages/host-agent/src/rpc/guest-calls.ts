/**
 * Streams that run inside of a sandbox's `withEnvd`: the use of the guest ends
 * when the stream does, whichever side ends it.
 */
import { RookeryError } from "@rookery/protocol/errors";
import type { SandboxId } from "../ids.ts";
import type { EnvdTarget, SandboxOperations } from "../sandbox-manager/sandbox.ts";

type Operations = Pick<SandboxOperations, "withEnvd">;

/** Runs `use` against envd; `signal` aborts when the caller goes or the VM ends. */
export async function withGuest<T>(
  operations: Operations,
  id: SandboxId,
  caller: AbortSignal,
  use: (target: EnvdTarget, signal: AbortSignal) => Promise<T>,
): Promise<T> {
  return await operations.withEnvd(id, async (target, vm) => {
    try {
      return await use(target, AbortSignal.any([caller, vm]));
    } catch (error) {
      throw vm.aborted ? vmEnded(vm, error) : error;
    }
  });
}

/** The same for a stream of answers. */
export async function* streamFromGuest<T>(
  operations: Operations,
  id: SandboxId,
  caller: AbortSignal,
  open: (target: EnvdTarget, signal: AbortSignal) => AsyncIterable<T>,
): AsyncGenerator<T, void, undefined> {
  const ready = Promise.withResolvers<{ target: EnvdTarget; vm: AbortSignal }>();
  const finished = Promise.withResolvers<void>();
  const use = operations.withEnvd(id, async (target, vm) => {
    ready.resolve({ target, vm });
    await finished.promise;
  });
  // A use that is refused never becomes ready; its failure is thrown from here.
  use.catch(ready.reject);
  const { target, vm } = await ready.promise;
  try {
    yield* open(target, AbortSignal.any([caller, vm]));
  } catch (error) {
    throw vm.aborted ? vmEnded(vm, error) : error;
  } finally {
    finished.resolve();
    await use;
  }
}

function vmEnded(vm: AbortSignal, cause: unknown): RookeryError {
  return vm.reason instanceof RookeryError
    ? vm.reason
    : new RookeryError("guest_error", "The sandbox's VM ended during the call", { cause });
}
