/**
 * Calls that run inside of a sandbox's `withEnvd`: the use of the guest ends
 * when the call or its stream does, whichever side ends it.
 *
 * A call that the guest failed sets the revival of its envd going. One of which
 * nothing was done waits for that, within a bound, and is made once more.
 */
import { RookeryError } from "@rookery/protocol/errors";
import type { SandboxId } from "../ids.ts";
import { NotServed } from "../sandbox-manager/guest.ts";
import type { EnvdTarget, SandboxOperations } from "../sandbox-manager/sandbox.ts";

type Operations = Pick<SandboxOperations, "withEnvd" | "reviveGuest">;

/** An envd that crashed is started again after a second, and under emulation needs a few more. */
const REVIVAL_WAIT_MS = 10_000;

/** Runs `use` against envd; `signal` aborts when the caller goes or the VM ends. `use` may be run a second time. */
export async function withGuest<T>(
  operations: Operations,
  id: SandboxId,
  caller: AbortSignal,
  use: (target: EnvdTarget, signal: AbortSignal) => Promise<T>,
): Promise<T> {
  try {
    return await useGuest(operations, id, caller, use);
  } catch (error) {
    if (!(await isServedAgain(operations, id, caller, error))) throw error;
  }
  return await useGuest(operations, id, caller, use);
}

/** The same for a `use` that takes what cannot be had twice: it is run once. */
export async function withGuestOnce<T>(
  operations: Operations,
  id: SandboxId,
  caller: AbortSignal,
  use: (target: EnvdTarget, signal: AbortSignal) => Promise<T>,
): Promise<T> {
  try {
    return await useGuest(operations, id, caller, use);
  } catch (error) {
    void isServedAgain(operations, id, caller, error);
    throw error;
  }
}

/** The same for a stream of answers. `open` may be called a second time, when nothing came of the first. */
export async function* streamFromGuest<T>(
  operations: Operations,
  id: SandboxId,
  caller: AbortSignal,
  open: (target: EnvdTarget, signal: AbortSignal) => AsyncIterable<T>,
): AsyncGenerator<T, void, undefined> {
  try {
    // NotServed comes before the first answer, or not at all.
    yield* streamOnce(operations, id, caller, open);
    return;
  } catch (error) {
    if (!(await isServedAgain(operations, id, caller, error))) throw error;
  }
  yield* streamOnce(operations, id, caller, open);
}

async function useGuest<T>(
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

async function* streamOnce<T>(
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

/** Sets the revival of a guest going that failed a call; true when the same call may be made again now. */
async function isServedAgain(
  operations: Operations,
  id: SandboxId,
  caller: AbortSignal,
  error: unknown,
): Promise<boolean> {
  if (!(error instanceof RookeryError) || error.code !== "guest_error") return false;
  const revived = operations.reviveGuest(id);
  if (!(error instanceof NotServed) || caller.aborted) return false;
  const tooLate = Promise.withResolvers<boolean>();
  AbortSignal.any([caller, AbortSignal.timeout(REVIVAL_WAIT_MS)]).addEventListener(
    "abort",
    () => tooLate.resolve(false),
    { once: true },
  );
  return await Promise.race([revived, tooLate.promise]);
}

function vmEnded(vm: AbortSignal, cause: unknown): RookeryError {
  return vm.reason instanceof RookeryError
    ? vm.reason
    : new RookeryError("guest_error", "The sandbox's VM ended during the call", { cause });
}
