/**
 * A host agent over Connect RPC: one HTTP/2 connection per host, opened at the
 * first call and kept alive by pings.
 *
 * Calls whose repetition is harmless are tried once more when nobody answered:
 * commands bear a generation, so the agent joins or repeats its answer. A
 * command that runs in a guest, or bytes written there, are never sent twice.
 */
import { create } from "@bufbuild/protobuf";
import { type Client, type Interceptor, type Transport, createClient } from "@connectrpc/connect";
import { createConnectTransport } from "@connectrpc/connect-node";
import { RookeryError } from "@rookery/protocol/errors";
import {
  HostAgentService,
  type ReadFileResponse,
  type WriteFileRequest,
  WriteFileRequestSchema,
} from "@rookery/protocol/hostagent";
import { ExponentialBackoff, handleWhen, retry } from "cockatiel";
import type { HostEndpoint } from "../db/hosts.ts";
import { isSnapshotId, type SandboxId } from "../model/ids.ts";
import { fromAgentError } from "./agent-errors.ts";
import type { HostAgent } from "./host-agent.ts";
import { HostSession } from "./host-session.ts";
import { fromEvent, fromSandbox, fromTime, toCommand, toLifetime, toOperation } from "./wire.ts";

export interface HostClientOptions {
  clusterId: string;
  /** Beyond an operation's own deadline, for the answer to come back. */
  answerGraceMs: number;
  /** For calls that only look. */
  lookMs: number;
  connectTimeoutMs: number;
  pingIntervalMs: number;
  pingTimeoutMs: number;
  now: () => number;
  /** What proves us to this host. */
  token(hostId: HostEndpoint["id"]): Promise<string>;
}

/** Chunks of a file on the wire. */
const CHUNK_BYTES = 1 << 20;
/** Each of stdout and stderr, and what a message needs besides. */
const MAX_OUTPUT_BYTES = 4 << 20;
const MAX_MESSAGE_BYTES = 2 * MAX_OUTPUT_BYTES + (1 << 20);

/** How messages get to a host: over HTTP/2, or over a network that a test made. */
export type OpenTransport = (
  endpoint: HostEndpoint,
  options: HostClientOptions & { interceptors: Interceptor[] },
) => { transport: Transport; close(): void };

export function openHostClient(
  endpoint: HostEndpoint,
  options: HostClientOptions,
  openTransport: OpenTransport = overHttp2,
): { agent: HostAgent; close(): void } {
  const authorize: Interceptor = (next) => async (request) => {
    request.header.set("authorization", `Bearer ${await options.token(endpoint.id)}`);
    return next(request);
  };
  const way = openTransport(endpoint, { ...options, interceptors: [authorize] });
  return {
    agent: hostAgent(createClient(HostAgentService, way.transport), options),
    close: () => way.close(),
  };
}

const overHttp2: OpenTransport = ({ address, certificateFingerprint }, { interceptors, ...options }) => {
  const baseUrl = `${certificateFingerprint === undefined ? "http" : "https"}://${address}`;
  const session = new HostSession({ ...options, authority: new URL(baseUrl).origin, certificateFingerprint });
  const transport = createConnectTransport({
    baseUrl,
    httpVersion: "2",
    sessionManager: session,
    acceptCompression: [],
    readMaxBytes: MAX_MESSAGE_BYTES,
    interceptors,
  });
  return { transport, close: () => session.close() };
};

function hostAgent(client: Client<typeof HostAgentService>, options: HostClientOptions): HostAgent {
  const { clusterId, lookMs: timeoutMs } = options;
  const again = retry(
    handleWhen((cause) => cause instanceof RookeryError && cause.code === "host_unreachable"),
    { maxAttempts: 1, backoff: new ExponentialBackoff({ initialDelay: 50, maxDelay: 200 }) },
  );
  const once = async <T>(call: () => Promise<T>, signal?: AbortSignal): Promise<T> => {
    try {
      return await call();
    } catch (cause) {
      throw fromAgentError(cause, signal);
    }
  };
  const repeatable = <T>(call: () => Promise<T>, signal?: AbortSignal): Promise<T> =>
    again.execute(() => once(call, signal));
  const until = (deadline: Date) => ({
    timeoutMs: Math.max(1, deadline.getTime() - options.now() + options.answerGraceMs),
  });

  return {
    createSandbox: (operation, spec) =>
      repeatable(async () => {
        const { source, vcpus, memoryMb, diskMb, env, teamId, envdAccessToken } = spec;
        const request = {
          operation: toOperation(operation, clusterId),
          source:
            source.kind === "image"
              ? { case: "image" as const, value: source.name }
              : { case: "snapshotId" as const, value: source.id },
          lifetime: toLifetime(spec),
          vcpus,
          memoryMb,
          diskMb,
          env,
          teamId,
          envdAccessToken,
        };
        return fromSandbox((await client.createSandbox(request, until(operation.deadline))).sandbox);
      }),
    destroySandbox: (operation) =>
      repeatable(async () => {
        const request = { operation: toOperation(operation, clusterId) };
        await client.destroySandbox(request, until(operation.deadline));
      }),
    pauseSandbox: (operation) =>
      repeatable(async () => {
        const request = { operation: toOperation(operation, clusterId) };
        return fromSandbox((await client.pauseSandbox(request, until(operation.deadline))).sandbox);
      }),
    resumeSandbox: (operation) =>
      repeatable(async () => {
        const request = { operation: toOperation(operation, clusterId) };
        return fromSandbox((await client.resumeSandbox(request, until(operation.deadline))).sandbox);
      }),
    updateSandbox: (sandboxId, lifetime) =>
      repeatable(async () => {
        const request = { sandboxId, lifetime: toLifetime(lifetime) };
        return fromSandbox((await client.updateSandbox(request, { timeoutMs })).sandbox);
      }),
    pingSandbox: (sandboxId) =>
      repeatable(async () => {
        return fromTime((await client.pingSandbox({ sandboxId }, { timeoutMs })).expiresAtUnixMs);
      }),
    getSandbox: async (sandboxId, signal) => {
      try {
        return await repeatable(
          async () => fromSandbox((await client.getSandbox({ sandboxId }, { timeoutMs, signal })).sandbox),
          signal,
        );
      } catch (cause) {
        if (cause instanceof RookeryError && cause.code === "not_found") return undefined;
        throw cause;
      }
    },
    listSandboxes: ({ after, limit }, signal) =>
      repeatable(async () => {
        const request = { afterSandboxId: after, limit };
        const { sandboxes, more } = await client.listSandboxes(request, { timeoutMs, signal });
        return { items: sandboxes.map(fromSandbox), more };
      }, signal),

    freezeSandbox: (sandboxId, signal) =>
      repeatable(
        async () =>
          fromSandbox((await client.freezeSandbox({ sandboxId, clusterId }, { timeoutMs, signal })).sandbox),
        signal,
      ),
    thawSandbox: (sandboxId, signal) =>
      repeatable(
        async () =>
          fromSandbox((await client.thawSandbox({ sandboxId, clusterId }, { timeoutMs, signal })).sandbox),
        signal,
      ),
    endHost: (signal) => once(async () => void (await client.endHost({ clusterId }, { signal })), signal),

    exec: (sandboxId, command, signal) =>
      once(async () => {
        const answer = await client.exec(
          { sandboxId, command: toCommand(command), maxOutputBytes: MAX_OUTPUT_BYTES },
          { signal, timeoutMs: command.timeoutMs + options.answerGraceMs },
        );
        return {
          stdout: answer.stdout,
          stderr: answer.stderr,
          exitCode: answer.exitCode,
          signal: answer.signal,
          timedOut: answer.timedOut,
          truncated: answer.truncated,
          durationMs: answer.durationMs,
        };
      }, signal),
    writeFile: (sandboxId, path, content, signal) =>
      once(async () => {
        await client.writeFile(writeRequests(sandboxId, path, content), { signal });
      }, signal),
    readFile: (sandboxId, path, signal) =>
      once(() => openFile(client.readFile({ sandboxId, path }, { signal }), signal), signal),

    createSnapshot: (operation, snapshotId, teamId) =>
      repeatable(async () => {
        const request = { operation: toOperation(operation, clusterId), snapshotId, teamId };
        const made = await client.createSnapshot(request, until(operation.deadline));
        const { vcpus, memoryMb, diskMb, sizeBytes, compat } = made;
        return { vcpus, memoryMb, diskMb, sizeBytes: Number(sizeBytes), compat: compat || undefined };
      }),
    storedSnapshots: (snapshotIds, signal) =>
      once(async () => {
        const { snapshots } = await client.getSnapshots({ snapshotIds: [...snapshotIds] }, { signal });
        return snapshots.flatMap(({ snapshotId: id, storeId }) =>
          isSnapshotId(id) && storeId !== "" ? [{ id, storeId }] : [],
        );
      }, signal),
    deleteSnapshot: (snapshotId) =>
      repeatable(async () => {
        await client.deleteSnapshot({ snapshotId, clusterId }, { timeoutMs });
      }),

    async *followEvents(afterNumber, signal) {
      try {
        for await (const { logId, event } of client.streamEvents({ afterNumber, follow: true }, { signal })) {
          yield { logId, event: event && fromEvent(event) };
        }
      } catch (cause) {
        throw fromAgentError(cause, signal);
      }
    },
    acknowledgeEvents: (logId, number) =>
      repeatable(async () => {
        await client.acknowledgeEvents({ logId, number }, { timeoutMs });
      }),
  };
}

async function* writeRequests(
  sandboxId: SandboxId,
  path: string,
  content: AsyncIterable<Uint8Array>,
): AsyncIterable<WriteFileRequest> {
  yield create(WriteFileRequestSchema, { part: { case: "start", value: { sandboxId, path } } });
  for await (const bytes of content) {
    for (let at = 0; at < bytes.length; at += CHUNK_BYTES) {
      const value = bytes.subarray(at, at + CHUNK_BYTES);
      yield create(WriteFileRequestSchema, { part: { case: "chunk", value } });
    }
  }
}

/** Waits for the first message, so that what is wrong with the path is known before any byte is answered. */
async function openFile(responses: AsyncIterable<ReadFileResponse>, signal: AbortSignal) {
  const iterator = responses[Symbol.asyncIterator]();
  const first = await iterator.next();
  const sizeBytes = first.done ? undefined : first.value.sizeBytes;
  async function* content(): AsyncGenerator<Uint8Array> {
    let next = first;
    try {
      while (!next.done) {
        if (next.value.chunk.length > 0) yield next.value.chunk;
        next = await iterator.next();
      }
    } catch (cause) {
      throw fromAgentError(cause, signal);
    } finally {
      await iterator.return?.();
    }
  }
  return { sizeBytes: sizeBytes === undefined ? undefined : Number(sizeBytes), content: content() };
}
