/**
 * The agent's side of its bond with the control plane: heartbeats, renewal of
 * the access token, and what happens when the bond breaks.
 *
 * Invariants: a new refresh token is durable before it, or the access token
 * that came with it, is used; while the control plane is lost (its refusal of a
 * refresh, or silence for `lostAfterMs`), no sandbox stays running that can be
 * paused; the agent never stops trying, unless the control plane proves that the
 * host was deleted. Without that proof nothing is ever destroyed.
 */
import { digestOfSandboxes } from "@rookery/protocol/sandbox-digest";
import { decodeJwt } from "jose";
import { provesHostEnd } from "../rpc/auth.ts";
import { sleep } from "../sandbox-manager/clock.ts";
import type { Clock } from "../sandbox-manager/clock.ts";
import type { Logger } from "../sandbox-manager/deps.ts";
import type { HostEventLog, SandboxPhase } from "../sandbox-manager/sandbox.ts";
import { TokenRefused } from "./control-plane-client.ts";
import type { ControlPlaneClient, Heartbeat } from "./control-plane-client.ts";
import type { Credentials, CredentialStore } from "./credentials.ts";

export const LINK_FAILPOINTS = [
  "refresh.request",
  "refresh.store",
  "heartbeat.request",
  "heartbeat.acknowledge",
] as const;

/** An access token is renewed when this much of its life has passed. */
const RENEW_AT = 0.8;
const LOST = {
  refused: "the control plane refuses this host",
  host_revoked: "this host's credentials were revoked; start the agent with a new registration token",
  host_deleted: "the control plane says, without a proof, that this host was deleted",
  silent: "the control plane is not heard",
} as const;
/** Hosts that started together must not beat together for ever. */
const JITTER = 0.1;

export interface LinkDeps {
  client: ControlPlaneClient;
  store: CredentialStore;
  clock: Clock;
  logger: Logger;
  intervals: {
    heartbeatMs: number;
    /** Silence after which the control plane counts as lost; 0: never. */
    lostAfterMs: number;
  };
  /** 0 … 1, to spread heartbeats. */
  random: () => number;
  sandboxes: () => readonly { id: string; phase: SandboxPhase; generation: bigint }[];
  load: (sandboxes: number) => Promise<Heartbeat["load"]>;
  /** Never throws: a store that is away is no reason to be silent. */
  snapshots: () => Promise<Heartbeat["snapshots"]>;
  events: Pick<HostEventLog, "logId" | "lastNumber" | "acknowledge">;
  /** Pauses all that runs; goes on past failures and reports them itself. Nothing to do when nothing runs. */
  pauseAll: () => Promise<void>;
  /** The host was deleted, and that is proven: destroys all that it has, and ends the run. */
  endHost: () => Promise<void>;
  /** Failpoint, by its name. */
  reach: (name: string) => void | Promise<void>;
}

export class ControlPlaneLink {
  readonly #deps: LinkDeps;
  #heardAtMs: number;
  #lost = false;
  #pausing: Promise<void> | undefined;

  constructor(deps: LinkDeps) {
    this.#deps = deps;
    this.#heardAtMs = deps.clock.monotonicMs();
  }

  /** Is the control plane lost at present? */
  get isLost(): boolean {
    return this.#lost;
  }

  /** Beats until `signal` aborts, then waits for a pause under way. */
  async run(signal: AbortSignal): Promise<void> {
    const { clock, intervals, random } = this.#deps;
    while (!signal.aborted) {
      await this.beat(signal);
      const delayMs = intervals.heartbeatMs * (1 + JITTER * (random() - 0.5));
      await sleep(clock, delayMs, signal).catch((cause: unknown) => {
        if (!signal.aborted) throw cause;
      });
    }
    await this.#pausing;
  }

  /** One heartbeat, with a renewal of the token before or after it where it is due. Never throws. */
  async beat(signal: AbortSignal): Promise<void> {
    const { clock, logger, intervals } = this.#deps;
    try {
      const heard = await this.#exchange(signal);
      this.#heardAtMs = clock.monotonicMs();
      if (this.#lost) logger.info({}, "the control plane is back; paused sandboxes stay paused");
      this.#lost = false;
      await this.#acknowledge(heard);
    } catch (err) {
      if (signal.aborted) return;
      if (err instanceof TokenRefused && (await this.#isProvenEnd(err))) return await this.#end();
      const silentMs = clock.monotonicMs() - this.#heardAtMs;
      logger.warn({ err, silentMs: Math.round(silentMs) }, "no heartbeat got through");
      const isSilent = intervals.lostAfterMs > 0 && silentMs >= intervals.lostAfterMs;
      if (err instanceof RefreshRefused) this.#lose(err.hostEnd?.reason ?? "refused");
      else if (isSilent) this.#lose("silent");
    }
  }

  async #exchange(signal: AbortSignal): Promise<Heard> {
    const { logger } = this.#deps;
    let credentials = this.#credentials();
    if (this.#isRenewalDue(credentials.accessToken)) {
      try {
        credentials = await this.#refresh(credentials, signal);
      } catch (err) {
        // The present token may still be good: only a refusal is final.
        if (err instanceof RefreshRefused || signal.aborted) throw err;
        logger.warn({ err }, "the access token could not be renewed yet");
      }
    }
    try {
      return await this.#heartbeat(credentials, signal);
    } catch (cause) {
      if (!(cause instanceof TokenRefused) || (await this.#isProvenEnd(cause))) throw cause;
      return await this.#heartbeat(await this.#refresh(credentials, signal), signal);
    }
  }

  async #heartbeat(credentials: Credentials, signal: AbortSignal): Promise<Heard> {
    const { client, events, logger, reach } = this.#deps;
    const sandboxes = this.#deps.sandboxes();
    const { logId, lastNumber } = events;
    const heartbeat: Heartbeat = {
      load: await this.#deps.load(sandboxes.length),
      snapshots: await this.#deps.snapshots(),
      digest: digestOfSandboxes(sandboxes.map(({ phase: status, ...rest }) => ({ ...rest, status }))),
      eventLogId: logId,
      lastEventNumber: lastNumber,
    };
    const { hostId, accessToken } = credentials;
    await reach("heartbeat.request.before");
    const { acknowledgedEvent } = await client.heartbeat(hostId, accessToken, heartbeat, signal);
    await reach("heartbeat.request.after");
    logger.debug({ sandboxes: sandboxes.length }, "heartbeat");
    return { logId, lastNumber, acknowledgedEvent };
  }

  /** A failure here is our disk's, and says nothing about the control plane. */
  async #acknowledge({ logId, lastNumber, acknowledgedEvent }: Heard): Promise<void> {
    const { events, logger, reach } = this.#deps;
    // More than there is would be another log's number: this one was lost meanwhile.
    if (acknowledgedEvent <= 0n || acknowledgedEvent > lastNumber) return;
    try {
      await reach("heartbeat.acknowledge.before");
      await events.acknowledge(logId, acknowledgedEvent);
      await reach("heartbeat.acknowledge.after");
    } catch (err) {
      logger.error({ err }, "acknowledged events could not be dropped");
    }
  }

  async #refresh(credentials: Credentials, signal: AbortSignal): Promise<Credentials> {
    const { client, store, reach } = this.#deps;
    await reach("refresh.request.before");
    let tokens;
    try {
      tokens = await client.refresh(credentials.refreshToken, signal);
    } catch (cause) {
      if (cause instanceof TokenRefused) throw new RefreshRefused(cause.message, cause.hostEnd);
      throw cause;
    }
    await reach("refresh.request.after");
    const next = { ...credentials, ...tokens };
    await reach("refresh.store.before");
    await store.replace(next);
    await reach("refresh.store.after");
    return next;
  }

  async #isProvenEnd({ hostEnd }: TokenRefused): Promise<boolean> {
    if (hostEnd?.proof === undefined) return false;
    return await provesHostEnd(hostEnd.proof, this.#credentials(), this.#deps.clock.nowMs());
  }

  async #end(): Promise<void> {
    try {
      await this.#deps.endHost();
    } catch (err) {
      this.#deps.logger.error({ err }, "this host was deleted, and something is left on it");
    }
  }

  #lose(why: keyof typeof LOST): void {
    const { logger, pauseAll } = this.#deps;
    if (!this.#lost) logger.error({ why }, `${LOST[why]}: pausing all sandboxes`);
    this.#lost = true;
    // Again at each beat while lost: what could not be paused is tried anew.
    this.#pausing ??= pauseAll()
      .catch((err: unknown) => logger.error({ err }, "pausing all sandboxes failed"))
      .finally(() => {
        this.#pausing = undefined;
      });
  }

  #isRenewalDue(accessToken: string): boolean {
    const { iat, exp } = lifeOf(accessToken);
    if (iat === undefined || exp === undefined) return false;
    return this.#deps.clock.nowMs() / 1000 >= iat + RENEW_AT * (exp - iat);
  }

  #credentials(): Credentials {
    const { current } = this.#deps.store;
    if (current === undefined) throw new Error("this host is not registered");
    return current;
  }
}

/** What a heartbeat brought back, and about which log. */
interface Heard {
  logId: string;
  lastNumber: bigint;
  acknowledgedEvent: bigint;
}

/** The end of trust until an operator, or the control plane's own recovery, restores it. */
class RefreshRefused extends TokenRefused {}

/** Read without verifying: it is the control plane's own token, and only tells us when to ask for another. */
function lifeOf(accessToken: string): { iat?: number | undefined; exp?: number | undefined } {
  try {
    return decodeJwt(accessToken);
  } catch {
    return {}; // not a JWT: let the control plane say what it thinks of it
  }
}
