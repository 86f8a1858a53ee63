/**
 * The agent's RPC server: hostagent.v1 over HTTP/2.
 *
 * Plain HTTP/2 is for loopback only; any other address needs TLS with the
 * agent's own certificate, whose fingerprint the control plane pins.
 */
import { createSecureServer, createServer } from "node:http2";
import type { ServerHttp2Session } from "node:http2";
import type { Socket } from "node:net";
import { connectNodeAdapter } from "@connectrpc/connect-node";
import { RookeryError } from "@rookery/protocol/errors";
import { HostAgentService } from "@rookery/protocol/hostagent";
import { isLoopback } from "../host/loopback.ts";
import type { Logger } from "../sandbox-manager/deps.ts";
import { TokenVerifier } from "./auth.ts";
import type { Trust } from "./auth.ts";
import { Gate } from "./gate.ts";
import { logAndTranslate } from "./interceptors.ts";
import { hostAgentService } from "./service.ts";
import type { ServiceDeps } from "./service.ts";

export interface RpcServerOptions extends Omit<ServiceDeps, "closing"> {
  listen: { host: string; port: number };
  /** Certificate and key, PEM; absent: plain HTTP/2, on loopback only. */
  certificate?: string | undefined;
  trust: () => Trust | undefined;
  logger: Logger;
  /** How long a connection may stay on which no call was admitted. */
  strangerMs?: number;
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
const HANDSHAKE_MS = 10_000;
const MAX_STREAMS_PER_SESSION = 4_096;
/** Node's 64 KiB windows let one file wait for every round trip. */
const WINDOW_BYTES = 1 << 20;
const SESSION_WINDOW_BYTES = 8 << 20;

export async function startRpcServer(options: RpcServerOptions): Promise<RpcServer> {
  const { listen, certificate } = options;
  if (certificate === undefined && !isLoopback(listen.host)) {
    throw new RookeryError(
      "invalid_request",
      `Without TLS the agent listens on loopback, not on ${listen.host}`,
    );
  }
  const closing = new AbortController();
  const service = hostAgentService({ ...options, closing: closing.signal });
  const gate = new Gate(new TokenVerifier(options.trust, options.clock), options.logger, options.strangerMs);
  const handler = connectNodeAdapter({
    routes: (router) => void router.service(HostAgentService, service),
    interceptors: [logAndTranslate(options.logger, options.clock)],
    contextValues: (request) => gate.contextOf(request),
    connect: true,
    grpc: false,
    grpcWeb: false,
    readMaxBytes: MAX_MESSAGE_BYTES,
    // No compression: nothing is gained on one machine, and no bomb can be sent.
    acceptCompression: [],
  });
  const settings = { initialWindowSize: WINDOW_BYTES, maxConcurrentStreams: MAX_STREAMS_PER_SESSION };
  const server =
    certificate === undefined
      ? createServer({ settings }, gate.before(handler))
      : createSecureServer(
          {
            settings,
            key: certificate,
            cert: certificate,
            minVersion: "TLSv1.3",
            handshakeTimeout: HANDSHAKE_MS,
          },
          gate.before(handler),
        );
  server.maxConnections = MAX_SESSIONS;
  const sessions = new Set<ServerHttp2Session>();
  server.on("session", (session) => {
    sessions.add(session);
    gate.watch(session);
    session.once("close", () => sessions.delete(session));
    session.on("error", (err) => options.logger.debug({ err }, "connection failed"));
    session.once("connect", () => session.setLocalWindowSize(SESSION_WINDOW_BYTES));
  });

  // Those too that are no session yet.
  const sockets = new Set<Socket>();
  server.on("connection", (socket: Socket) => {
    sockets.add(socket);
    socket.once("close", () => sockets.delete(socket));
  });
  server.on("tlsClientError", (err) => options.logger.debug({ err }, "no handshake"));

  await new Promise<void>((resolve, reject) => {
    server.once("error", reject);
    server.listen(listen.port, listen.host, resolve);
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
        for (const socket of sockets) socket.destroy();
      }, graceMs);
      await closed;
      clearTimeout(limit);
    },
  };
}
