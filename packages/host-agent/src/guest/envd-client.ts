/**
 * The agent's client of envd in its guests, over HTTP/1.1 with kept connections.
 *
 * envd is hostile: every answer is bounded in size, depth and time (limits.ts),
 * and what it says becomes a RookeryError with a code of our table. All calls
 * take an AbortSignal, and end with its reason when it aborts.
 */
import { setTimeout as sleep } from "node:timers/promises";
import { RookeryError } from "@rookery/protocol/errors";
import type { EnvdTarget } from "../sandbox-manager/sandbox.ts";
import { execCommand, runCommand } from "./commands.ts";
import type { CommandEvent, CommandResult } from "./commands.ts";
import { GuestConnections } from "./connections.ts";
import type { EnvdAddress } from "./connections.ts";
import type { EnvdInit } from "./envd-init.ts";
import { readFile, writeFile } from "./files.ts";
import type { FileTarget } from "./files.ts";
import { errorOfStatus, errorOfTransport, parseGuestJson } from "./guest-answers.ts";
import { GUEST_LIMITS } from "./limits.ts";
import type { GuestLimits } from "./limits.ts";
import { readSmallBody } from "./process-calls.ts";
import type { Command, Guest } from "./process-calls.ts";

/** Between two tries to be answered by a guest that is coming up. */
const HEALTH_PAUSE_MS = 5;
/** The first try may have met a guest that was not there yet; under load an honest one needs longer. */
const FIRST_HEALTH_TRY_MS = 250;
const LAST_HEALTH_TRY_MS = 4_000;

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
    let tryMs = FIRST_HEALTH_TRY_MS;
    while (!(await this.#isHealthy(address, tryMs, signal))) {
      await sleep(HEALTH_PAUSE_MS, undefined, { signal }).catch(() => undefined);
      signal.throwIfAborted();
      tryMs = Math.min(2 * tryMs, LAST_HEALTH_TRY_MS);
    }
  }

  async #isHealthy(address: EnvdAddress, tryMs: number, signal: AbortSignal): Promise<boolean> {
    signal.throwIfAborted();
    const limit = AbortSignal.any([signal, AbortSignal.timeout(tryMs)]);
    try {
      return await this.#connections.use(address, async (pool) => {
        const response = await pool.request({ method: "GET", path: "/health", signal: limit });
        await readSmallBody(response, this.#limits);
        return response.statusCode === 204 || response.statusCode === 200;
      });
    } catch {
      // Not there yet, whatever the words: the caller's signal decides for how long we ask.
      signal.throwIfAborted();
      return false;
    }
  }

  /** Is envd there now? Asks once. */
  async checkHealthy(address: EnvdAddress, signal: AbortSignal): Promise<boolean> {
    return this.#isHealthy(address, this.#limits.answerMs, signal);
  }

  /** Makes a restored guest one of its own. Safe to repeat with the same `restoreId`. */
  async init(address: EnvdAddress, init: EnvdInit, signal: AbortSignal): Promise<void> {
    const limit = AbortSignal.any([signal, AbortSignal.timeout(this.#limits.initMs)]);
    await this.#connections.use(address, async (pool) => {
      try {
        const response = await pool.request({
          method: "POST",
          path: "/init",
          headers: { "content-type": "application/json" },
          body: JSON.stringify(init),
          headersTimeout: this.#limits.initMs,
          signal: limit,
        });
        const body = await readSmallBody(response, this.#limits);
        if (response.statusCode === 204) return;
        throw errorOfStatus(response.statusCode, parseGuestJson(body, this.#limits), { subject: "guest" });
      } catch (cause) {
        if (limit.aborted && !signal.aborted) {
          throw new RookeryError("guest_error", "The guest did not take its identity in time", { cause });
        }
        throw errorOfTransport(cause, [signal]);
      }
    });
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
    const { pool, release } = this.#connections.acquire(target);
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
    const { pool, release } = this.#connections.acquire(target);
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
