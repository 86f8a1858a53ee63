/**
 * QMP: QEMU's control protocol, JSON lines over a Unix socket.
 *
 * Invariants: every command ends, by its answer, its time-out, its signal or
 * the connection's end; a line is never longer than MAX_LINE_BYTES, whatever
 * the other side sends; an answer that nobody waits for any more is dropped.
 */
import { connect, type Socket } from "node:net";
import { RookeryError } from "@rookery/protocol/errors";
import { z } from "zod";
import { ANSWERS, type QmpAnswer, type QmpArgumentsOf, type QmpCommand } from "./qmp-commands.ts";

/** The longest honest answer (query-named-block-nodes of a long chain) is far below. */
const MAX_LINE_BYTES = 4 << 20;
const DEFAULT_TIMEOUT_MS = 10_000;
/** More unanswered commands than any operation of ours has. */
const MAX_PENDING = 64;

const messageSchema = z.object({
  QMP: z.unknown().optional(),
  id: z.number().optional(),
  return: z.unknown().optional(),
  error: z.object({ class: z.string().max(64), desc: z.string() }).optional(),
  event: z.string().max(128).optional(),
  data: z.record(z.string(), z.unknown()).optional(),
});

export interface QmpEvent {
  name: string;
  data: Record<string, unknown>;
}

/** QEMU understood the command and said no. */
export class QmpError extends Error {
  override readonly name = "QmpError";
  constructor(command: string, description: string) {
    super(`${command}: ${description.slice(0, 1000)}`);
  }
}

interface Pending {
  command: string;
  resolve(answer: unknown): void;
  reject(cause: unknown): void;
}

export interface QmpOptions {
  signal?: AbortSignal;
  timeoutMs?: number;
}

export class QmpClient implements AsyncDisposable {
  /** Resolves when the connection has ended, with why. Never rejects. */
  readonly closed: Promise<Error>;
  readonly #socket: Socket;
  readonly #pending = new Map<number, Pending>();
  readonly #onEvent: (event: QmpEvent) => void;
  readonly #greeted = Promise.withResolvers<void>();
  #closedWith: Error | undefined;
  #resolveClosed!: (cause: Error) => void;
  #nextId = 1;
  #chunks: Buffer[] = [];
  #chunkBytes = 0;

  private constructor(socket: Socket, onEvent: (event: QmpEvent) => void) {
    this.#socket = socket;
    this.#onEvent = onEvent;
    this.closed = new Promise((resolve) => (this.#resolveClosed = resolve));
    // Whether anybody waits for the greeting or not, its failure also shows in `closed`.
    this.#greeted.promise.catch(() => undefined);
    socket.on("data", (chunk) => this.#receive(chunk));
    socket.on("error", (cause) => this.#end(cause));
    socket.on("close", () => this.#end(new Error("QEMU closed its control connection")));
  }

  /** Connects, greets, and leaves negotiation mode. The path is the agent's own, never the VMM's choice. */
  static async connect(
    path: string,
    onEvent: (event: QmpEvent) => void,
    options: QmpOptions = {},
  ): Promise<QmpClient> {
    const socket = connect({ path });
    const client = new QmpClient(socket, onEvent);
    try {
      await client.#bounded(client.#greeted.promise, "the QMP greeting", options);
      await client.command("qmp_capabilities", {}, options);
      return client;
    } catch (cause) {
      await client[Symbol.asyncDispose]();
      throw cause;
    }
  }

  /** Sends a command and waits for its parsed answer. Throws QmpError when QEMU refuses. */
  async command<C extends QmpCommand>(
    command: C,
    commandArguments: QmpArgumentsOf<C>,
    options: QmpOptions = {},
  ): Promise<QmpAnswer<C>> {
    options.signal?.throwIfAborted();
    if (this.#closedWith !== undefined) throw this.#closedWith;
    if (this.#pending.size >= MAX_PENDING) throw new Error("too many unanswered QMP commands");
    const id = this.#nextId;
    this.#nextId += 1;
    const answered = new Promise<unknown>((resolve, reject) =>
      this.#pending.set(id, { command, resolve, reject }),
    );
    try {
      this.#socket.write(`${JSON.stringify({ execute: command, arguments: commandArguments, id })}\n`);
      const answer = ANSWERS[command].safeParse(await this.#bounded(answered, command, options));
      if (!answer.success)
        throw new Error(`${command}: QEMU's answer is not understood: ${answer.error.message}`);
      // The schema and the type come from the same entry, which TypeScript cannot see through the key.
      return answer.data as QmpAnswer<C>;
    } finally {
      this.#pending.delete(id);
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#end(new Error("the control connection was closed by the agent"));
    await this.closed;
  }

  async #bounded<T>(promise: Promise<T>, what: string, options: QmpOptions): Promise<T> {
    const { signal, timeoutMs = DEFAULT_TIMEOUT_MS } = options;
    const limit = Promise.withResolvers<never>();
    const timer = setTimeout(
      () =>
        limit.reject(new RookeryError("timeout", `The VMM did not answer ${what} within ${timeoutMs} ms.`)),
      timeoutMs,
    );
    const onAbort = (): void => limit.reject(signal?.reason);
    signal?.addEventListener("abort", onAbort, { once: true });
    try {
      return await Promise.race([promise, limit.promise]);
    } finally {
      clearTimeout(timer);
      signal?.removeEventListener("abort", onAbort);
      promise.catch(() => undefined);
    }
  }

  #end(cause: Error): void {
    if (this.#closedWith !== undefined) return;
    this.#closedWith = cause;
    this.#socket.destroy();
    this.#greeted.reject(cause);
    for (const pending of this.#pending.values()) pending.reject(cause);
    this.#resolveClosed(cause);
  }

  #receive(chunk: Buffer): void {
    let rest = chunk;
    for (let end = rest.indexOf(0x0a); end >= 0; end = rest.indexOf(0x0a)) {
      const line = Buffer.concat([...this.#chunks, rest.subarray(0, end)]);
      rest = rest.subarray(end + 1);
      this.#chunks = [];
      this.#chunkBytes = 0;
      if (line.length > MAX_LINE_BYTES) return this.#end(new Error("QEMU sent an overlong line"));
      if (line.length > 1) this.#receiveLine(line);
    }
    if (rest.length === 0) return;
    this.#chunks.push(rest);
    this.#chunkBytes += rest.length;
    if (this.#chunkBytes > MAX_LINE_BYTES) this.#end(new Error("QEMU sent an overlong line"));
  }

  /** What a handler cannot bear ends this connection: its data is the VMM's choice, and no other VM's concern. */
  #handEventOn(name: string, data: Record<string, unknown>): void {
    try {
      this.#onEvent({ name, data });
    } catch (cause) {
      this.#end(new Error("an event of QEMU's could not be handled", { cause }));
    }
  }

  #receiveLine(line: Buffer): void {
    if (this.#closedWith !== undefined) return;
    let message: z.output<typeof messageSchema>;
    try {
      message = messageSchema.parse(JSON.parse(line.toString("utf8")));
    } catch (cause) {
      return this.#end(new Error("QEMU sent what is not QMP", { cause }));
    }
    if (message.event !== undefined) return this.#handEventOn(message.event, message.data ?? {});
    if (message.QMP !== undefined) return this.#greeted.resolve();
    const pending = message.id === undefined ? undefined : this.#pending.get(message.id);
    if (pending === undefined) return;
    if (message.error === undefined) pending.resolve(message.return);
    else pending.reject(new QmpError(pending.command, message.error.desc));
  }
}
