/**
 * The agent's client of envd in its guests, over HTTP/1.1 with kept connections.
 *
 * envd is hostile: every answer is bounded in size, depth and time (limits.ts),
 * and what it says becomes a RookeryError with a code of our table. All calls
 * take an AbortSignal, and end with its reason when it aborts.
 */
import { setTimeout as sleep } from "node:timers/promises";
import { RookeryError } from "@rookery/protocol/errors";
import type { Pool } from "undici";
import type { EnvdTarget } from "../sandbox-manager/sandbox.ts";
import { execCommand, runCommand } from "./commands.ts";
import type { CommandEvent, CommandResult } from "./commands.ts";
import { GuestConnections } from "./connections.ts";
import type { EnvdAddress } from "./connections.ts";
import type { EnvdInit } from "./envd-init.ts";
import { readFile, writeFile } from "./files.ts";
import type { FileTarget } from "./files.ts";
import { errorOfStatus, parseGuestJson } from "./guest-answers.ts";
import { GUEST_LIMITS } from "./limits.ts";
import type { GuestLimits } from "./limits.ts";
import { readSmallBody } from "./process-calls.ts";
import type { Command, Guest } from "./process-calls.ts";
import { takesToken } from "./token-check.ts";

/** After a try that failed at once: the guest's kernel is there, envd is not yet. */
const HEALTH_PAUSE_MS = 5;
/** The same for an envd that is being started again, which takes seconds. */
const TOKEN_PAUSE_MS = 100;
/**
 * A try that hangs goes on beside the next one, which comes so much later and
 * then ever later: an honest guest on a busy host may need seconds, and each
 * try that is given up and made anew costs it more of them.
 */
const FIRST_HEALTH_HEDGE_MS = 1_000;
const LAST_HEALTH_HEDGE_MS = 8_000;

/** What the agent asks of guests: of a real one through `EnvdClient`, of a simulated one without a wire. */
export type Guests = Pick<
  EnvdClient,
  | "waitHealthy"
  | "init"
  | "knowsToken"
  | "exec"
  | "execStream"
  | "writeFile"
  | "readFile"
  | "release"
  | "close"
>;

export class EnvdClient {
  readonly #limits: GuestLimits;
  readonly #connections: GuestConnections;

  constructor(limits: GuestLimits = GUEST_LIMITS) {
    this.#limits = limits;
    this.#connections = new GuestConnections(limits);
  }

  /**
   * Waits until envd of a VM that was just started or thawed answers. Ends old
   * connections to its address first: they were another VM's.
   */
  async waitHealthy(address: EnvdAddress, signal: AbortSignal): Promise<void> {
    await this.#connections.reset(address);
    const others = new AbortController();
    const limit = AbortSignal.any([signal, others.signal]);
    const answered = Promise.withResolvers<"answered">();
    let hedgeMs = FIRST_HEALTH_HEDGE_MS;
    try {
      for (;;) {
        signal.throwIfAborted();
        const failed = this.#isHealthy(address, limit).then((healthy) => {
          if (healthy) answered.resolve("answered");
          return sleep(HEALTH_PAUSE_MS, undefined);
        });
        const hedge = sleep(hedgeMs, "hangs" as const, { signal: limit }).catch(() => undefined);
        const first = await Promise.race([answered.promise, failed, hedge]);
        if (first === "answered") return;
        if (first === "hangs") hedgeMs = Math.min(2 * hedgeMs, LAST_HEALTH_HEDGE_MS);
      }
    } finally {
      others.abort();
    }
  }

  /** Asks once. What went wrong is no matter: the caller's signal decides for how long it asks again. */
  async #isHealthy(address: EnvdAddress, signal: AbortSignal): Promise<boolean> {
    try {
      return await this.#connections.use(address, async (pool) => {
        const response = await pool.request({ method: "GET", path: "/health", signal });
        await readSmallBody(response, this.#limits);
        return response.statusCode === 204 || response.statusCode === 200;
      });
    } catch {
      return false;
    }
  }

  /**
   * Makes a restored guest one of its own. Waits for it as `waitHealthy` does,
   * so a thawed guest need not be asked for its health first: envd takes the
   * same `restoreId` any number of times.
   */
  async init(address: EnvdAddress, init: EnvdInit, signal: AbortSignal): Promise<void> {
    const limit = AbortSignal.any([signal, AbortSignal.timeout(this.#limits.initMs)]);
    for (;;) {
      try {
        return await this.#connections.use(address, (pool) => this.#initOnce(pool, init, limit));
      } catch (cause) {
        signal.throwIfAborted();
        if (limit.aborted) {
          throw new RookeryError("guest_error", "The guest did not take its identity in time", { cause });
        }
        if (!(cause instanceof ConnectionBroke)) throw cause;
        await sleep(HEALTH_PAUSE_MS);
      }
    }
  }

  async #initOnce(pool: Pool, init: EnvdInit, signal: AbortSignal): Promise<void> {
    let status: number;
    let body: Uint8Array;
    try {
      const response = await pool.request({
        method: "POST",
        path: "/init",
        headers: { "content-type": "application/json" },
        body: JSON.stringify(init),
        headersTimeout: this.#limits.initMs,
        signal,
      });
      status = response.statusCode;
      body = await readSmallBody(response, this.#limits);
    } catch (cause) {
      throw cause instanceof RookeryError ? cause : new ConnectionBroke("no answer to /init", { cause });
    }
    if (status === 204) return;
    throw errorOfStatus(status, parseGuestJson(body, this.#limits), { subject: "guest" });
  }

  /**
   * Asks until envd answers: whether it takes the token. It does not once it
   * crashed and was started again in its guest.
   */
  async knowsToken(target: EnvdTarget, signal: AbortSignal): Promise<boolean> {
    for (;;) {
      signal.throwIfAborted();
      try {
        return await this.#use(target, (guest) => takesToken(guest, signal));
      } catch {
        // What went wrong is no matter: the caller's signal decides for how long it is asked again.
        await sleep(TOKEN_PAUSE_MS, undefined, { signal }).catch(() => undefined);
      }
    }
  }

  exec(
    target: EnvdTarget,
    command: Command,
    options: { maxOutputBytes: number },
    signal: AbortSignal,
  ): Promise<CommandResult> {
    return this.#use(target, (guest) => execCommand(guest, command, options, signal));
  }

  async *execStream(
    target: EnvdTarget,
    command: Command,
    signal: AbortSignal,
  ): AsyncGenerator<CommandEvent, void, undefined> {
    const { pool, release } = await this.#connections.acquire(target);
    try {
      yield* runCommand({ pool, accessToken: target.accessToken, limits: this.#limits }, command, signal);
    } finally {
      release();
    }
  }

  /** The answer is the number of bytes written. */
  writeFile(
    target: EnvdTarget,
    file: FileTarget,
    content: AsyncIterable<Uint8Array>,
    signal: AbortSignal,
  ): Promise<number> {
    return this.#use(target, (guest) => writeFile(guest, file, content, signal));
  }

  /** Yields the size first, when the guest says it, then the pieces. */
  async *readFile(
    target: EnvdTarget,
    file: FileTarget,
    signal: AbortSignal,
  ): AsyncGenerator<{ sizeBytes: number | undefined } | Uint8Array, void, undefined> {
    const { pool, release } = await this.#connections.acquire(target);
    try {
      yield* readFile({ pool, accessToken: target.accessToken, limits: this.#limits }, file, signal);
    } finally {
      release();
    }
  }

  /** Ends all connections to a VM that is gone or frozen for good. */
  release(address: EnvdAddress): Promise<void> {
    return this.#connections.reset(address);
  }

  close(): Promise<void> {
    return this.#connections.close();
  }

  #use<T>(target: EnvdTarget, use: (guest: Guest) => Promise<T>): Promise<T> {
    return this.#connections.use(target, (pool) =>
      use({ pool, accessToken: target.accessToken, limits: this.#limits }),
    );
  }
}

/** Nothing was answered: an idempotent call may be made again. */
class ConnectionBroke extends Error {
  override readonly name = "ConnectionBroke";
}
