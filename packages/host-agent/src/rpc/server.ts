/**
 * The agent's RPC server: hostagent.v1 over HTTP/2.
 *
 * Plain HTTP/2 is for loopback only; any other address needs TLS with the
 * agent's own certificate, whose fingerprint the control plane pins. Until the
 * agent has one, an address that others can reach is refused.
 */
import { createServer } from "node:http2";
import type { ServerHttp2Session } from "node:http2";
import { isIP, isIPv6 } from "node:net";
import { connectNodeAdapter } from "@connectrpc/connect-node";
import { RookeryError } from "@rookery/protocol/errors";
import { HostAgentService } from "@rookery/protocol/hostagent";
import type { Logger } from "../sandbox-manager/deps.ts";
import { TokenVerifier } from "./auth.ts";
import type { Trust } from "./auth.ts";
import { authenticate, logAndTranslate } from "./interceptors.ts";
import { hostAgentService } from "./service.ts";
import type { ServiceDeps } from "./service.ts";

export interface RpcServerOptions extends Omit<ServiceDeps, "closing"> {
  listen: { host: string; port: number };
  trust: () => Trust | undefined;
  logger: Logger;
}

export interface RpcServer {
  /** As it was bound: `port` is the real one where 0 was asked for. */
  readonly address: { host: string; port: number };
  /** Takes no more calls, waits at most `graceMs` for those under way, then ends them. */
  close(graceMs: number): Promise<void>;
}

/** Room for a piece of 1 MiB, or for the largest exec or create that decode.ts lets pass. */
const MAX_MESSAGE_BYTES = (4 << 20) + (64 << 10);
const MAX_SESSIONS = 256;
const MAX_STREAMS_PER_SESSION = 4_096;
/** Node's 64 KiB windows let one file wait for every round trip. */
const WINDOW_BYTES = 1 << 20;
const SESSION_WINDOW_BYTES = 8 << 20;

export async function startRpcServer(options: RpcServerOptions): Promise<RpcServer> {
  assertLoopback(options.listen.host);
  const closing = new AbortController();
  const service = hostAgentService({ ...options, closing: closing.signal });
  const verifier = new TokenVerifier(options.trust, options.clock);
  const handler = connectNodeAdapter({
    routes: (router) => void router.service(HostAgentService, service),
    interceptors: [logAndTranslate(options.logger, options.clock), authenticate(verifier)],
    connect: true,
    grpc: false,
    grpcWeb: false,
    readMaxBytes: MAX_MESSAGE_BYTES,
    // No compression: nothing is gained on one machine, and no bomb can be sent.
    acceptCompression: [],
  });
  const server = createServer(
    {
      settings: { initialWindowSize: WINDOW_BYTES, maxConcurrentStreams: MAX_STREAMS_PER_SESSION },
    },
    handler,
  );
  server.maxConnections = MAX_SESSIONS;
  const sessions = new Set<ServerHttp2Session>();
  server.on("session", (session) => {
    sessions.add(session);
    session.once("close", () => sessions.delete(session));
    session.on("error", (err) => options.logger.debug({ err }, "connection failed"));
    session.once("connect", () => session.setLocalWindowSize(SESSION_WINDOW_BYTES));
  });

  await new Promise<void>((resolve, reject) => {
    server.once("error", reject);
    server.listen(options.listen.port, options.listen.host, resolve);
  });
  server.on("error", (err) => options.logger.error({ err }, "server failed"));
  const bound = server.address();
  if (bound === null || typeof bound === "string") throw new Error("the server has no port");

  return {
    address: { host: bound.address, port: bound.port },
    async close(graceMs) {
      closing.abort();
      const closed = new Promise<void>((resolve) => server.close(() => resolve()));
      for (const session of sessions) session.close();
      const limit = setTimeout(() => {
        for (const session of sessions) session.destroy();
      }, graceMs);
      await closed;
      clearTimeout(limit);
    },
  };
}

function assertLoopback(host: string): void {
  const loopback = isIPv6(host) ? host === "::1" : isIP(host) === 4 && host.startsWith("127.");
  if (loopback) return;
  throw new RookeryError(
    "invalid_request",
    `The agent can listen on loopback only (127.0.0.1 or ::1), not on ${host}: other addresses need TLS, which this version does not have`,
  );
}
