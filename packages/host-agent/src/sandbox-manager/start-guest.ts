/**
 * From a thawed VM to a guest of its own: wait for envd, give it its identity.
 * Until `/init` is answered no user code may run on a clone's state.
 */
import { RookeryError } from "@rookery/protocol/errors";
import type { PlacedVm } from "../vm-pool/vm-pool.ts";
import { deadlineSignal } from "./clock.ts";
import { guestAddressOf, type Core, type SandboxEntry } from "./core.ts";
import { randomHex } from "./new-ids.ts";

/** Enough for the guest kernel's pool, whose state all clones share. */
const ENTROPY_BYTES = 64;
const DEFAULT_USER = "user";

export async function startGuest(
  core: Core,
  entry: SandboxEntry,
  placed: PlacedVm,
  options: { growRootFs: boolean },
  signal: AbortSignal,
): Promise<void> {
  const { clock, config, guest } = core.deps;
  const { spec, machineId } = entry.record;
  const ended = new AbortController();
  void placed.vm.exited.then((exit) => {
    ended.abort(new RookeryError("guest_error", `the guest ended while it started: ${exit.message}`));
  });
  using limit = deadlineSignal(
    clock,
    config.guestTimeoutMs,
    () => new RookeryError("guest_error", "the guest did not answer in time"),
    [signal, ended.signal],
  );
  const address = guestAddressOf(placed);
  try {
    await guest.init(
      address,
      {
        restoreId: randomHex(core.deps, 16),
        sandboxId: spec.id,
        hostname: spec.id,
        machineId,
        timestamp: new Date(clock.nowMs()).toISOString(),
        entropy: Buffer.from(core.deps.randomBytes(ENTROPY_BYTES)).toString("base64"),
        envVars: { ...spec.env },
        accessToken: spec.envdAccessToken,
        defaultUser: DEFAULT_USER,
        growRootFs: options.growRootFs,
      },
      limit.signal,
    );
  } catch (cause) {
    if (limit.signal.aborted && limit.signal.reason instanceof RookeryError) {
      throw new RookeryError(limit.signal.reason.code, limit.signal.reason.message, { cause });
    }
    throw cause;
  }
}
