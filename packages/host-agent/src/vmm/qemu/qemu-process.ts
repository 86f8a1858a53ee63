/**
 * One QEMU process and the agent's connection to it: commands, and its end.
 *
 * Invariants: `exited` resolves exactly once, after the process is gone, with
 * the reason that was known first. A guest that ends leaves its process paused,
 * so the reason can be asked for; the process is ended by us then. A process
 * whose control connection is broken for good counts as hung, and is ended.
 */
import type { ChildProcess } from "node:child_process";
import { rm } from "node:fs/promises";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { RookeryError } from "@rookery/protocol/errors";
import { writeFileAtomic } from "../../host/atomic-file.ts";
import { comesFromFullDisk } from "../../host/errno.ts";
import { isAlive, signalProcess, waitUntilGone, type ProcessIdentity } from "../../host/process.ts";
import type { VmExit, VmPlace } from "../vmm.ts";
import { CONSOLE_BYTES, CONSOLE_CHARDEV } from "./arguments.ts";
import { consoleLines, consoleTail, saysPanic } from "./console.ts";
import { logFileOf } from "./launcher.ts";
import { QmpClient, type QmpEvent, type QmpOptions } from "./qmp.ts";
import type { QmpAnswer, QmpArgumentsOf, QmpCommand } from "./qmp-commands.ts";
import { boundLog, logTail } from "./vmm-log.ts";

/** From exec to the greeting; 0.1 s when the host is idle. */
const START_TIMEOUT_MS = 30_000;
const KILL_TIMEOUT_MS = 20_000;
/** How long a process whose control connection broke may take to die or to take a new one. */
const RECONNECT_TIMEOUT_MS = 3_000;
/** An adopted process is nobody's child: its end is looked for. */
const WATCH_INTERVAL_MS = 500;
const CONSOLE_TIMEOUT_MS = 2_000;
const BOUND_LOG_INTERVAL_MS = 10_000;

export function qmpSocketOf(place: VmPlace): string {
  return join(place.socketDir, "qmp.sock");
}

/** For the agent's log, from where nobody waits for an answer. */
function warn(cause: unknown): void {
  process.emitWarning(cause instanceof Error ? cause : String(cause));
}

/** Whatever the VMM sent: no other value is made a string of, since its own `toString` could be anything. */
function textOf(value: unknown): string {
  return typeof value === "string" ? value.slice(0, 64) : "unknown";
}

export class QemuProcess {
  readonly place: VmPlace;
  readonly identity: ProcessIdentity;
  readonly exited: Promise<VmExit>;
  readonly #gone: Promise<void>;
  readonly #ending = new AbortController();
  #exitStatus = "";
  #reason: VmExit | undefined;
  #qmp: QmpClient | undefined;
  #migration: PromiseWithResolvers<void> | undefined;
  #kill: Promise<void> | undefined;

  private constructor(place: VmPlace, identity: ProcessIdentity, child: ChildProcess | undefined) {
    this.place = place;
    this.identity = identity;
    this.#gone = child === undefined ? this.#pollUntilGone() : this.#waitForChild(child);
    this.exited = this.#gone.then(() => this.#finish());
    const log = setInterval(() => {
      // A log that cannot be cut now is cut the next time.
      boundLog(logFileOf(place)).catch(() => undefined);
    }, BOUND_LOG_INTERVAL_MS).unref();
    void this.#gone.then(() => clearInterval(log));
  }

  /** Waits until the process takes commands. When that fails a `child` of ours is dead; one that was adopted goes on. */
  static async connect(
    place: VmPlace,
    identity: ProcessIdentity,
    child: ChildProcess | undefined,
    signal: AbortSignal,
  ): Promise<QemuProcess> {
    const qemu = new QemuProcess(place, identity, child);
    try {
      await qemu.#connect({ signal, timeoutMs: START_TIMEOUT_MS });
      return qemu;
    } catch (cause) {
      // One that was adopted is somebody's sandbox: what becomes of it is for others to say.
      if (child === undefined) throw await qemu.failure("The VMM does not answer.", cause);
      const failure = await qemu.failure("The VMM did not start.", cause);
      await qemu.kill();
      throw failure;
    }
  }

  /** Leaves the process to the agent that comes after this one: it takes one connection at a time. */
  async detach(): Promise<void> {
    const qmp = this.#qmp;
    this.#qmp = undefined;
    await qmp?.[Symbol.asyncDispose]();
  }

  get hasEnded(): boolean {
    return this.#ending.signal.aborted;
  }

  async command<C extends QmpCommand>(
    command: C,
    commandArguments: QmpArgumentsOf<C>,
    options: QmpOptions,
  ): Promise<QmpAnswer<C>> {
    if (this.#qmp === undefined) throw new Error("there is no control connection to the VMM");
    return this.#qmp.command(command, commandArguments, options);
  }

  /** Runs a command that begins a migration, in or out, and waits for the migration's end. */
  async migrate(begin: () => Promise<unknown>, options: Required<QmpOptions>): Promise<void> {
    const qmp = this.#qmp;
    if (this.#migration !== undefined || qmp === undefined) throw new Error("no migration is possible now");
    const migration = Promise.withResolvers<void>();
    migration.promise.catch(() => undefined);
    this.#migration = migration;
    const limit = AbortSignal.any([options.signal, AbortSignal.timeout(options.timeoutMs)]);
    const onLimit = (): void => migration.reject(limit.reason);
    limit.addEventListener("abort", onLimit, { once: true });
    // An incoming migration that fails ends the process. (QEMU 7.2 migration/migration.c)
    void qmp.closed.then((cause) => migration.reject(cause));
    try {
      await begin();
      await migration.promise;
    } finally {
      limit.removeEventListener("abort", onLimit);
      this.#migration = undefined;
    }
  }

  /** Ends the process and waits until it is gone. */
  async kill(): Promise<void> {
    this.#reason ??= { reason: "killed", message: "The VM was ended by its host." };
    await this.#end();
  }

  /** `cause`, with what the VMM itself had to say. An abort and a RookeryError stay what they are. */
  async failure(message: string, cause: unknown): Promise<unknown> {
    if (cause instanceof RookeryError) return cause;
    if (cause instanceof Error && (cause.name === "AbortError" || cause.name === "TimeoutError"))
      return cause;
    if (comesFromFullDisk(cause))
      return new RookeryError("out_of_disk", "this host's disk is full", { cause });
    // A process that is about to end says why first.
    await Promise.race([this.#gone, delay(100)]);
    const said = await logTail(logFileOf(this.place));
    const detail = [cause instanceof Error ? cause.message : String(cause), this.#exitStatus, said]
      .filter((part) => part !== "")
      .join("\n");
    return new RookeryError("host_error", message, { cause: new Error(detail, { cause }) });
  }

  // ── the connection ────────────────────────────────────────────────────────

  async #connect(options: Required<QmpOptions>): Promise<void> {
    const connecting = QmpClient.connect(qmpSocketOf(this.place), (event) => this.#onEvent(event), options);
    const qmp = await Promise.race([
      connecting,
      this.#gone.then(() => Promise.reject(new Error("the VMM ended while the agent connected to it"))),
    ]);
    this.#qmp = qmp;
    void qmp.closed
      .then((cause) => this.#onClosed(qmp, cause))
      .catch((cause: unknown) => this.#endLater(cause));
  }

  async #onClosed(qmp: QmpClient, cause: Error): Promise<void> {
    if (this.#qmp !== qmp) return;
    this.#qmp = undefined;
    if (this.hasEnded) return;
    const patience = { timeoutMs: RECONNECT_TIMEOUT_MS / 2 };
    const isGone = await waitUntilGone(this.identity, patience).catch((unknown: unknown) => {
      warn(unknown);
      return false; // a new connection says more
    });
    if (isGone) return;
    try {
      await this.#connect({ signal: this.#ending.signal, timeoutMs: RECONNECT_TIMEOUT_MS });
    } catch (again) {
      if (this.hasEnded) return;
      this.#reason ??= {
        reason: "hung",
        message: `The VMM stopped answering: ${cause.message}; ${again instanceof Error ? again.message : ""}.`,
      };
      await this.#end();
    }
  }

  #onEvent({ name, data }: QmpEvent): void {
    switch (name) {
      case "MIGRATION":
        if (data["status"] === "completed") this.#migration?.resolve();
        else if (data["status"] === "failed") void this.#onMigrationFailed(this.#migration);
        return;
      case "SHUTDOWN":
        // guest-panic has an event of its own; host-… are our own doing.
        if (data["guest"] === true) this.#onGuestEnded(textOf(data["reason"]));
        return;
      case "GUEST_PANICKED":
        this.#onGuestEnded("guest-panic");
        return;
      default:
    }
  }

  #onGuestEnded(how: string): void {
    void this.guestEnded(how).catch((cause: unknown) => this.#endLater(cause));
  }

  async #onMigrationFailed(migration: PromiseWithResolvers<void> | undefined): Promise<void> {
    try {
      const answer = await this.command("query-migrate", {}, { timeoutMs: CONSOLE_TIMEOUT_MS });
      migration?.reject(new Error(`migration failed: ${answer["error-desc"] ?? "QEMU does not say why"}`));
    } catch (cause) {
      migration?.reject(new Error("migration failed", { cause }));
    }
  }

  // ── the end ───────────────────────────────────────────────────────────────

  /** The guest has ended, its process waits: find out why, then end it. */
  async guestEnded(how: string): Promise<void> {
    if (this.#reason !== undefined) return;
    // Claimed before the first wait: a guest ends with several events.
    this.#reason = { reason: "guest_shutdown", message: "The guest shut down." };
    const lines = await this.#readConsole();
    const tail = consoleTail(lines);
    if (how === "guest-panic" || saysPanic(lines)) {
      this.#reason = { reason: "guest_crashed", message: `The guest's kernel crashed.\n${tail}` };
    } else if (how === "guest-reset") {
      this.#reason = { reason: "guest_shutdown", message: `The guest rebooted, which ends it.\n${tail}` };
    } else if (how !== "guest-shutdown") {
      this.#reason = { reason: "guest_crashed", message: `The guest ended (${how}).\n${tail}` };
    }
    await this.#end();
  }

  /** The console's last lines, also left in a file beside the VMM's log. Empty when QEMU does not give them. */
  async #readConsole(): Promise<string[]> {
    try {
      const encoded = await this.command(
        "ringbuf-read",
        { device: CONSOLE_CHARDEV, size: CONSOLE_BYTES, format: "base64" },
        { timeoutMs: CONSOLE_TIMEOUT_MS },
      );
      const raw = Buffer.from(encoded, "base64");
      await writeFileAtomic(join(this.place.logDir, "console.log"), raw, { sync: false });
      return consoleLines(raw);
    } catch (cause) {
      return [`(the console could not be read: ${cause instanceof Error ? cause.message : String(cause)})`];
    }
  }

  /** Where nobody waits for the end that failed by `cause`: tries again until the process is gone. Never rejects. */
  async #endLater(cause: unknown): Promise<void> {
    warn(cause);
    while (!this.hasEnded) {
      await delay(WATCH_INTERVAL_MS, undefined, { ref: false });
      try {
        await this.#end();
      } catch (again) {
        warn(again);
      }
    }
  }

  #end(): Promise<void> {
    this.#kill ??= (async () => {
      try {
        await signalProcess(this.identity, "SIGKILL");
      } catch (cause) {
        this.#kill = undefined;
        throw cause;
      }
      const patience = new AbortController();
      // A timer of its own keeps the event loop alive, which an unreferenced child does not.
      const tooLong = delay(KILL_TIMEOUT_MS, true, { signal: patience.signal }).catch(() => false);
      const stuck = await Promise.race([this.exited.then(() => false), tooLong]);
      patience.abort();
      if (stuck) {
        // Stuck in the kernel: a later call tries again.
        this.#kill = undefined;
        throw new RookeryError("host_error", "The VMM's process does not end.");
      }
    })();
    return this.#kill;
  }

  async #waitForChild(child: ChildProcess): Promise<void> {
    if (child.exitCode === null && child.signalCode === null) {
      await new Promise<void>((resolve) => child.once("exit", () => resolve()));
    }
    this.#exitStatus =
      child.signalCode === null ? `exit code ${child.exitCode}` : `ended by ${child.signalCode}`;
  }

  /** Never rejects: a look that failed (this process has too many open files) says nothing, and is repeated. */
  async #pollUntilGone(): Promise<void> {
    let hasWarned = false;
    for (;;) {
      try {
        if (!(await isAlive(this.identity))) return;
      } catch (cause) {
        if (!hasWarned) warn(cause);
        hasWarned = true;
      }
      await delay(WATCH_INTERVAL_MS, undefined, { ref: false });
    }
  }

  async #finish(): Promise<VmExit> {
    this.#ending.abort(new Error("the VMM has ended"));
    const qmp = this.#qmp;
    this.#qmp = undefined;
    await qmp?.[Symbol.asyncDispose]();
    const said = this.#reason === undefined ? await logTail(logFileOf(this.place)).catch(() => "") : "";
    this.#reason ??= {
      reason: "vmm_exited",
      message: ["The VMM ended unexpectedly", this.#exitStatus, said]
        .filter((part) => part !== "")
        .join("\n"),
    };
    await rm(qmpSocketOf(this.place), { force: true }).catch(() => undefined);
    return this.#reason;
  }
}
