/**
 * Connections to PostgreSQL whose server side outlives its client.
 *
 * A server's process costs 30 ms to start and as much again until it knows the
 * tables, and a run's replicas would have fifty of them. So a client's socket is
 * lent a process that is already there, the answers to its first message are
 * those that the process once gave, and statements have names, since a process
 * that has planned a statement once need not do it again. Clients are the real
 * ones and notice nothing; a process that was severed in the middle of anything
 * is ended for good, as the server does it, and never lent again.
 */
import { EventEmitter } from "node:events";
import { type Socket, connect } from "node:net";
import type { Duplex } from "node:stream";
import { Client, type ClientConfig } from "pg";

const READY = 0x5a;
const KEY_DATA = 0x4b;
const TERMINATE = 0x58;
const IDLE_END = Buffer.from([READY, 0, 0, 0, 5, "I".charCodeAt(0)]);
const TERMINATED = errorMessage({
  S: "FATAL",
  C: "57P01",
  M: "terminating connection due to administrator command",
});

/** One process of the server. */
interface Backend {
  socket: Socket;
  /** What it was begun with: user, database, settings. */
  startup: string;
  /** What it said to that. */
  greeting: Buffer;
  pid: number;
  /** Statements that it knows by name, as `pg` keeps them. */
  statements: Record<string, string>;
  /** Nothing was asked since it last said that it waits, outside of any transaction. */
  isIdle: boolean;
}

/** All processes for one database, lent or not. */
export class Backends {
  readonly #path: string;
  readonly #terminate: (pids: number[]) => Promise<void>;
  readonly #idle: Backend[] = [];
  readonly #all = new Set<Backend>();

  /** `terminate` returns when they have ended. */
  constructor(path: string, terminate: (pids: number[]) => Promise<void>) {
    this.#path = path;
    this.#terminate = terminate;
  }

  async lend(startup: Buffer): Promise<Backend> {
    const key = startup.toString("latin1");
    const at = this.#idle.findLastIndex((backend) => backend.startup === key);
    const [warm] = at < 0 ? [] : this.#idle.splice(at, 1);
    return warm ?? (await this.#start(startup, key));
  }

  /** Those that are idle wait for their next client; the others end. */
  async takeBack(backends: readonly Backend[]): Promise<void> {
    for (const { socket } of backends) socket.removeAllListeners("data").resume();
    this.#idle.push(...backends.filter(({ isIdle }) => isIdle));
    const busy = backends.filter(({ isIdle }) => !isIdle);
    for (const backend of busy) {
      this.#all.delete(backend);
      backend.socket.destroy();
    }
    if (busy.length > 0) await this.#terminate(busy.map(({ pid }) => pid));
  }

  close(): void {
    for (const { socket } of this.#all) socket.destroy();
  }

  async #start(startup: Buffer, key: string): Promise<Backend> {
    const socket = connect(this.#path);
    socket.on("error", () => undefined);
    const greeting = await new Promise<Buffer>((resolve, reject) => {
      let said = Buffer.alloc(0);
      socket.on("data", (part) => {
        said = Buffer.concat([said, part]);
        if (saysIdle(said)) resolve(said);
      });
      socket.once("close", () => reject(new Error(`the server takes no connection: ${said.toString()}`)));
      socket.write(startup);
    });
    socket.removeAllListeners("data");
    const pid = pidIn(greeting);
    const backend = { socket, startup: key, greeting, pid, statements: {}, isIdle: true };
    this.#all.add(backend);
    return backend;
  }
}

/** All connections of one program, which can break, or find nobody. */
export class Connections {
  readonly #backends: Backends;
  readonly #open = new Set<LentSocket>();
  /** New ones are refused. */
  isRefused = false;

  constructor(backends: Backends) {
    this.#backends = backends;
  }

  /** In the place of `pg`'s own. */
  get Client(): typeof Client {
    // oxlint-disable-next-line typescript/no-this-alias -- two classes, one inside of the other
    const connections = this;
    return class extends Client {
      constructor(config?: ClientConfig | string) {
        const socket = new LentSocket(connections, (statements) =>
          Object.assign(this.connection, { parsedStatements: statements }),
        );
        // oxlint-disable-next-line typescript/no-unsafe-type-assertion -- has what `pg` uses of it
        const stream = () => socket as unknown as Duplex;
        super({ ...(typeof config === "string" ? { connectionString: config } : config), stream });
      }

      // oxlint-disable-next-line typescript/no-explicit-any -- its many forms are of no concern here
      override query(first: any, ...rest: any[]): any {
        const [values, ...others] = rest;
        if (typeof first !== "string" || !Array.isArray(values)) return super.query(first, ...rest);
        // oxlint-disable-next-line typescript/no-unsafe-type-assertion -- callers that have a callback pass it on
        return super.query({ name: nameOf(first), text: first, values }, ...(others as []));
      }
    };
  }

  /** Every connection breaks; returns when the server has ended what was under way on them. */
  async sever(): Promise<void> {
    const severed = [...this.#open];
    this.#open.clear();
    await this.#backends.takeBack(severed.flatMap((socket) => socket.break()));
  }

  async lend(socket: LentSocket, startup: Buffer): Promise<Backend> {
    const backend = await this.#backends.lend(startup);
    this.#open.add(socket);
    return backend;
  }

  async close(socket: LentSocket): Promise<void> {
    this.#open.delete(socket);
    await this.#backends.takeBack(socket.detach());
  }
}

/** What `pg` needs of a socket. */
class LentSocket extends EventEmitter {
  readonly #connections: Connections;
  readonly #onLent: (statements: Record<string, string>) => void;
  #backend: Backend | undefined;
  #corked: Buffer[] | undefined;
  writable = true;

  constructor(connections: Connections, onLent: (statements: Record<string, string>) => void) {
    super();
    this.#connections = connections;
    this.#onLent = onLent;
  }

  connect(): void {
    process.nextTick(() => {
      if (!this.writable) return;
      if (!this.#connections.isRefused) return this.emit("connect");
      return this.destroy(
        Object.assign(new Error("connect ECONNREFUSED"), { code: "ECONNREFUSED", syscall: "connect" }),
      );
    });
  }

  write(message: Buffer, written?: () => void): boolean {
    const backend = this.#backend;
    if (backend === undefined) void this.#start(message);
    else if (message[0] === TERMINATE) void this.#connections.close(this);
    else if (this.#corked !== undefined) this.#corked.push(message);
    else {
      backend.isIdle = false;
      backend.socket.write(message);
    }
    if (written !== undefined) process.nextTick(written);
    return true;
  }

  cork(): void {
    this.#corked ??= [];
  }

  uncork(): void {
    const messages = this.#corked ?? [];
    this.#corked = undefined;
    if (messages.length > 0 && this.#backend !== undefined) this.write(Buffer.concat(messages));
  }

  end(): void {
    this.destroy();
  }

  destroy(cause?: Error): void {
    if (!this.writable) return;
    this.writable = false;
    void this.#connections.close(this);
    process.nextTick(() => {
      if (cause !== undefined) this.emit("error", cause);
      this.emit("close");
    });
  }

  /** As the server ends a connection. */
  break(): Backend[] {
    const backends = this.detach();
    this.writable = false;
    this.emit("data", TERMINATED);
    this.emit("close");
    return backends;
  }

  detach(): Backend[] {
    const backend = this.#backend;
    this.#backend = undefined;
    return backend === undefined ? [] : [backend];
  }

  async #start(startup: Buffer): Promise<void> {
    try {
      const backend = await this.#connections.lend(this, startup);
      this.#backend = backend;
      if (!this.writable) return await this.#connections.close(this);
      this.#onLent(backend.statements);
      backend.socket.on("data", (part) => {
        if (saysIdle(part)) backend.isIdle = true;
        this.emit("data", part);
      });
      this.emit("data", backend.greeting);
    } catch (cause) {
      this.destroy(cause instanceof Error ? cause : new Error(String(cause)));
    }
  }

  setNoDelay(): void {}
  setKeepAlive(): void {}
  ref(): void {}
  unref(): void {}
}

const names = new Map<string, string>();

function nameOf(statement: string): string {
  const known = names.get(statement) ?? `s${names.size}`;
  names.set(statement, known);
  return known;
}

function saysIdle(messages: Buffer): boolean {
  return messages.subarray(-IDLE_END.length).equals(IDLE_END);
}

/** Messages are a type, a length that counts itself, and the rest. */
function pidIn(greeting: Buffer): number {
  for (let at = 0; at < greeting.length; at += 1 + greeting.readUInt32BE(at + 1)) {
    if (greeting[at] === KEY_DATA) return greeting.readUInt32BE(at + 5);
  }
  throw new Error("the server did not say which process it is");
}

function errorMessage(fields: Readonly<Record<string, string>>): Buffer {
  const text = Object.entries(fields).map(([field, value]) => `${field}${value}\0`);
  const body = Buffer.from(`${text.join("")}\0`);
  const head = Buffer.from([0x45, 0, 0, 0, 0]);
  head.writeUInt32BE(body.length + 4, 1);
  return Buffer.concat([head, body]);
}
