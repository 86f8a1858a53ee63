/**
 * hostagent.v1.HostAgentService: decode, call, encode. Nothing is decided here.
 */
import type { HandlerContext, ServiceImpl } from "@connectrpc/connect";
import { RookeryError } from "@rookery/protocol/errors";
import type { HostAgentService, WriteFileRequest } from "@rookery/protocol/hostagent";
import type { EnvdClient } from "../guest/envd-client.ts";
import type { Clock } from "../sandbox-manager/clock.ts";
import type { SandboxOperations } from "../sandbox-manager/sandbox.ts";
import * as decode from "./decode.ts";
import { commandEventMessage, hostEventMessage, int64, sandboxMessage } from "./encode.ts";
import { streamFromGuest, withGuest, withGuestOnce } from "./guest-calls.ts";
import { TRUST } from "./interceptors.ts";

/** Events in one answer of a stream that does not follow, when the caller sets no bound. */
const DEFAULT_EVENTS = 1_000;

export interface ServiceDeps {
  operations: SandboxOperations;
  envd: Pick<EnvdClient, "exec" | "execStream" | "writeFile" | "readFile">;
  clock: Clock;
  /** Aborts when the agent takes its leave: streams without an end of their own end then. */
  closing: AbortSignal;
  /** Destroys all that is on this host and lets the agent end; throws when something is left. */
  endHost: () => Promise<void>;
}

export function hostAgentService({
  operations,
  envd,
  clock,
  closing,
  endHost,
}: ServiceDeps): ServiceImpl<typeof HostAgentService> {
  const border = (context: HandlerContext): decode.Border => {
    const trust = context.values.get(TRUST);
    if (trust === undefined) throw new RookeryError("unauthenticated", "Nobody was authenticated");
    return { clusterId: trust.clusterId, clock };
  };

  return {
    async createSandbox(request, context) {
      const operation = decode.operation(request.operation, border(context));
      return { sandbox: sandboxMessage(await operations.create(decode.sandboxSpec(request), operation)) };
    },
    async destroySandbox(request, context) {
      await operations.destroy(decode.operation(request.operation, border(context)));
      return {};
    },
    async pauseSandbox(request, context) {
      const operation = decode.operation(request.operation, border(context));
      return { sandbox: sandboxMessage(await operations.pause(operation)) };
    },
    async resumeSandbox(request, context) {
      const operation = decode.operation(request.operation, border(context));
      const lifetime = request.lifetime === undefined ? undefined : decode.lifetime(request.lifetime);
      return { sandbox: sandboxMessage(await operations.resume(operation, lifetime)) };
    },
    async pingSandbox(request) {
      return { expiresAtUnixMs: int64(await operations.ping(decode.sandboxId(request.sandboxId))) };
    },
    async updateSandbox(request) {
      const id = decode.sandboxId(request.sandboxId);
      return { sandbox: sandboxMessage(await operations.update(id, decode.lifetime(request.lifetime))) };
    },
    async getSandbox(request) {
      return { sandbox: sandboxMessage(await operations.get(decode.sandboxId(request.sandboxId))) };
    },
    async listSandboxes(request) {
      const { items, more } = await operations.list(decode.listRequest(request));
      return { sandboxes: items.map(sandboxMessage), more };
    },

    async freezeSandbox(request, context) {
      decode.assertCluster(request.clusterId, border(context));
      return { sandbox: sandboxMessage(await operations.freeze(decode.sandboxId(request.sandboxId))) };
    },
    async thawSandbox(request, context) {
      decode.assertCluster(request.clusterId, border(context));
      return { sandbox: sandboxMessage(await operations.thaw(decode.sandboxId(request.sandboxId))) };
    },

    async exec(request, context) {
      const id = decode.sandboxId(request.sandboxId);
      const command = decode.command(request.command);
      const options = { maxOutputBytes: decode.maxOutputBytes(request.maxOutputBytes) };
      return await withGuest(operations, id, context.signal, (target, signal) =>
        envd.exec(target, command, options, signal),
      );
    },
    async *execStream(request, context) {
      const id = decode.sandboxId(request.sandboxId);
      const command = decode.command(request.command);
      const events = streamFromGuest(operations, id, context.signal, (target, signal) =>
        envd.execStream(target, command, signal),
      );
      for await (const event of events) yield commandEventMessage(event);
    },
    async writeFile(requests, context) {
      const { start, chunks } = await splitWrite(requests);
      const id = decode.sandboxId(start.sandboxId);
      const file = decode.fileTarget(start);
      const sizeBytes = await withGuestOnce(operations, id, context.signal, (target, signal) =>
        envd.writeFile(target, file, chunks, signal),
      );
      return { sizeBytes: int64(sizeBytes) };
    },
    async *readFile(request, context) {
      const id = decode.sandboxId(request.sandboxId);
      const file = decode.fileTarget(request);
      const parts = streamFromGuest(operations, id, context.signal, (target, signal) =>
        envd.readFile(target, file, signal),
      );
      for await (const part of parts) {
        if (part instanceof Uint8Array) yield { chunk: part };
        else yield part.sizeBytes === undefined ? {} : { sizeBytes: int64(part.sizeBytes) };
      }
    },

    async createSnapshot(request, context) {
      const operation = decode.operation(request.operation, border(context));
      const { snapshotId, teamId } = decode.snapshotRequest(request);
      const view = await operations.createSnapshot(operation, snapshotId, teamId);
      const { vcpus, memoryMb, diskMb, sizeBytes, compat = "" } = view;
      return { vcpus, memoryMb, diskMb, sizeBytes: int64(sizeBytes), compat };
    },
    async getSnapshots(request) {
      const here = operations.getSnapshots(decode.snapshotIds(request.snapshotIds));
      return { snapshots: here.map(({ snapshotId, storeId = "" }) => ({ snapshotId, storeId })) };
    },
    async deleteSnapshot(request, context) {
      decode.assertCluster(request.clusterId, border(context));
      await operations.deleteSnapshot(decode.snapshotId(request.snapshotId));
      return {};
    },

    async *streamEvents(request, context) {
      const { events } = operations;
      let left = request.max === 0 ? DEFAULT_EVENTS : request.max;
      // First which log this is: a caller with numbers of another one must know even if nothing follows.
      yield { logId: events.logId };
      const { afterNumber: after, follow } = request;
      const signal = AbortSignal.any([context.signal, closing]);
      for await (const event of events.read({ after, follow, signal })) {
        yield { logId: events.logId, event: hostEventMessage(event) };
        left -= 1;
        if (left === 0 && !follow) return;
      }
    },
    async acknowledgeEvents(request) {
      await operations.events.acknowledge(request.logId, request.number);
      return {};
    },

    async endHost(request, context) {
      decode.assertCluster(request.clusterId, border(context));
      await endHost();
      return {};
    },
  };
}

/** The first message names the file, the others are its contents. */
async function splitWrite(requests: AsyncIterable<WriteFileRequest>): Promise<{
  start: { sandboxId: string; path: string; user?: string | undefined };
  chunks: AsyncGenerator<Uint8Array, void, undefined>;
}> {
  const iterator = requests[Symbol.asyncIterator]();
  const first = await iterator.next();
  if (first.done === true || first.value.part.case !== "start") {
    throw new RookeryError("invalid_request", "The first message must name the file");
  }
  async function* chunks(): AsyncGenerator<Uint8Array, void, undefined> {
    for (;;) {
      const next = await iterator.next();
      if (next.done === true) return;
      if (next.value.part.case !== "chunk") {
        throw new RookeryError("invalid_request", "Only pieces of the file may follow its name");
      }
      yield next.value.part.value;
    }
  }
  return { start: first.value.part.value, chunks: chunks() };
}
