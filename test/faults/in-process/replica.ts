/** One replica of the control plane: the real one, on a simulated network, that can die at any moment. */
import { ConnectError, Code } from "@connectrpc/connect";
import type { UniversalClientFn } from "@connectrpc/connect/protocol";
import { createTransport } from "@connectrpc/connect/protocol-connect";
import { setTimeout as sleep } from "node:timers/promises";
import { parseConfig } from "../../../packages/control-plane/src/config.ts";
import { type ControlPlane, openControlPlane } from "../../../packages/control-plane/src/control-plane.ts";
import type { OpenTransport } from "../../../packages/control-plane/src/hosts/host-client.ts";
import type { ApiAnswer, ApiRequest } from "../world.ts";
import { NoAnswer } from "../world.ts";
import { type SharedApi, inject } from "./api.ts";
import type { Connections } from "./backends.ts";
import type { RunDatabase } from "./database.ts";
import { Life, never } from "./life.ts";
import type { Log } from "./log.ts";
import { type Link, type Network, orAborted } from "./network.ts";
import type { SimulatedHost } from "./host.ts";

const TIMES = {
  ROOKERY_CREATE_MS: 2_000,
  ROOKERY_PAUSE_MS: 1_500,
  ROOKERY_RESUME_MS: 1_500,
  ROOKERY_DESTROY_MS: 1_500,
  ROOKERY_SNAPSHOT_MS: 1_500,
  ROOKERY_OPERATION_LEASE_MS: 600,
  ROOKERY_SWEEP_MS: 250,
  ROOKERY_HOST_CHECK_MS: 400,
  ROOKERY_HOST_CHECK_LIMIT_MS: 1_000,
  ROOKERY_HOST_SILENT_MS: 1_300,
  ROOKERY_EVENT_LEASE_MS: 900,
  // So that agents renew theirs within a run.
  ROOKERY_ACCESS_TOKEN_MS: 3_000,
};
const CLIENT = { answerGraceMs: 300, lookMs: 600, connectTimeoutMs: 250 };
const SECRET = "a secret key for runs of the fault suite";

export interface ReplicaDeps {
  index: number;
  api: SharedApi;
  database: RunDatabase;
  network: Network;
  pace: number;
  /** Who listens at an address. */
  hostAt: (address: string) => SimulatedHost | undefined;
  log: Log;
}

interface Incarnation {
  name: string;
  life: Life;
  connections: Connections;
  plane: ControlPlane;
}

export class Replica {
  readonly #deps: ReplicaDeps;
  #incarnations = 0;
  #current: Incarnation | undefined;

  constructor(deps: ReplicaDeps) {
    this.#deps = deps;
  }

  get plane(): ControlPlane | undefined {
    return this.#current?.plane;
  }

  /** Tries until the database lets it. */
  async start(isWanted: () => boolean = () => true): Promise<void> {
    while (this.#current === undefined && isWanted()) {
      try {
        await this.#open();
      } catch (cause) {
        this.#deps.log.note({ replica: this.#deps.index, err: cause }, "a replica could not start yet");
        await sleep(50);
      }
    }
  }

  async #open(): Promise<void> {
    const { index, database, log, pace } = this.#deps;
    this.#incarnations += 1;
    const name = `replica${index}x${this.#incarnations}`;
    const life = new Life();
    const connections = database.connections();
    const config = parseConfig({
      DATABASE_URL: database.url,
      ROOKERY_SECRET_KEY: SECRET,
      ROOKERY_DATABASE_CONNECTIONS: "4",
      ...Object.fromEntries(Object.entries(TIMES).map(([key, value]) => [key, String(value * pace)])),
    });
    const clock = {
      now: () => Date.now(),
      sleep: async (ms: number, signal?: AbortSignal) => {
        await sleep(ms, undefined, { signal }).catch(() => undefined);
        if (life.isOver) await never();
      },
    };
    const plane = await openControlPlane(config, log.of(name), {
      clock,
      client: {
        answerGraceMs: CLIENT.answerGraceMs * pace,
        lookMs: CLIENT.lookMs * pace,
        connectTimeoutMs: CLIENT.connectTimeoutMs * pace,
      },
      openTransport: this.#transport(life),
      DatabaseClient: connections.Client,
    });
    plane.start();
    this.#current = { name, life, connections, plane };
  }

  /** In the middle of everything. */
  async crash(): Promise<void> {
    const dying = this.#current;
    this.#current = undefined;
    if (dying === undefined) return;
    const ended = dying.life.end();
    await this.#deps.database.cutOff(dying.connections);
    await ended;
    // Its memory goes: sockets are gone already, and nothing that it does has an effect.
    void dying.plane.close().catch(() => undefined);
  }

  /** In order, as by a SIGTERM. */
  async close(): Promise<void> {
    await this.#current?.plane.close();
    this.#current = undefined;
  }

  async call(request: ApiRequest, apiKey: string): Promise<ApiAnswer> {
    const headers = {
      "x-api-key": apiKey,
      ...(request.idempotencyKey !== undefined && { "idempotency-key": request.idempotencyKey }),
    };
    return await this.answer({ ...request, headers });
  }

  /** An HTTP request at its door; whoever asks hears nothing when it dies meanwhile. */
  async answer(request: {
    method: "GET" | "POST" | "PATCH" | "DELETE";
    path: string;
    body?: unknown;
    headers: Record<string, string>;
  }): Promise<ApiAnswer> {
    const serving = this.#current;
    if (serving === undefined) throw new NoAnswer("connection refused");
    const log = (line: string): void => this.#deps.log.note({ line }, `${serving.name}: its API`);
    try {
      return await serving.life.orEnd(
        inject(this.#deps.api, { services: serving.plane.services, log }, request),
      );
    } catch (cause) {
      if (serving.life.isOver) throw new NoAnswer("connection reset", { cause });
      throw cause;
    }
  }

  #transport(life: Life): OpenTransport {
    const { network, index, hostAt } = this.#deps;
    return ({ address }, { interceptors }) => {
      const gone = new AbortController();
      const httpClient: UniversalClientFn = async (request) => {
        if (life.isOver) return await never();
        const host = hostAt(address);
        if (host === undefined) throw broken("ECONNREFUSED");
        const link = { host: host.index, replica: index, way: "commands" as const };
        const ends = [gone.signal, life.signal, ...(request.signal === undefined ? [] : [request.signal])];
        const signal = AbortSignal.any(ends);
        const body = await gather(request.body ?? []);
        const deliver = (until: AbortSignal) =>
          host.serve({ ...request, body: onceMore(body), signal: until });
        const isLost = host.lateCommands.keep(request.url, body, async () =>
          drain((await deliver(new AbortController().signal)).body),
        );
        if (isLost) throw broken("ECONNRESET");
        const answered = network.carry(link, () => deliver(signal), broken);
        const answer = await life.hear(orAborted(signal, answered));
        return { ...answer, body: throughNetwork(answer.body, { network, link, life }) };
      };
      const transport = createTransport({
        httpClient,
        baseUrl: `http://${address}`,
        useBinaryFormat: true,
        interceptors,
        acceptCompression: [],
        sendCompression: null,
        compressMinBytes: Number.MAX_SAFE_INTEGER,
        readMaxBytes: 16 << 20,
        writeMaxBytes: 16 << 20,
      });
      return { transport, close: () => gone.abort(broken("ERR_HTTP2_GOAWAY_SESSION")) };
    };
  }
}

/** As the layers above know a connection that failed. */
function broken(code: string): Error {
  return new ConnectError(`the connection failed: ${code}`, Code.Unavailable, undefined, undefined, {
    code,
  });
}

async function gather(body: AsyncIterable<Uint8Array> | []): Promise<Buffer> {
  const parts: Uint8Array[] = [];
  for await (const part of body) parts.push(part);
  return Buffer.concat(parts);
}

async function* onceMore(body: Uint8Array): AsyncGenerator<Uint8Array> {
  yield body;
}

async function drain(body: AsyncIterable<Uint8Array>): Promise<void> {
  for await (const _ of body);
}

async function* throughNetwork(
  body: AsyncIterable<Uint8Array>,
  { network, link, life }: { network: Network; link: Link; life: Life },
): AsyncGenerator<Uint8Array> {
  for await (const part of body) {
    if ((await network.pass(link)) !== "fine") throw broken("ECONNRESET");
    if (life.isOver) await never();
    yield part;
  }
}
