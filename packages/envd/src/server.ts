/**
 * envd's HTTP server: connections, the gate of the token, and who answers what.
 *
 * The access token is asked for everywhere but at GET /health, at /files
 * (which also takes signatures) and at POST /init (which asks for the host's
 * address). Nothing here runs while no request does: an idle guest must not
 * dirty memory, so Node's half-minute check of connections is off and each
 * connection has its own time-out instead.
 */
import { createServer } from "node:http";
import type { IncomingMessage, Server, ServerResponse } from "node:http";
import type { Socket } from "node:net";
import { filesystem as filesystemWire, process as processWire } from "@rookery/protocol/envd";
import { HttpError } from "./errors.ts";
import { filesystemMethods } from "./filesystem/filesystem-service.ts";
import { getFile, postFiles } from "./files/files-route.ts";
import type { FilesDeps } from "./files/files-route.ts";
import { sendJson, sendNothing } from "./http-answer.ts";
import type { InitRoute } from "./init/init-route.ts";
import {
  BODY_IDLE_MS,
  IDLE_CONNECTION_MS,
  MAX_CONNECTIONS,
  MAX_HEADER_BYTES,
  MAX_TIMEOUT_MS,
} from "./limits.ts";
import type { MetricsReader } from "./metrics.ts";
import { ConnectServer } from "./rpc/connect-server.ts";
import { processMethods } from "./process/process-service.ts";
import type { ProcessDeps } from "./process/process-service.ts";

/** Of a body that nobody wants any more: what is read so that its sender gets to see the answer. */
const MAX_DISCARDED_BYTES = 64 * 1024 * 1024;

export interface ServerDeps extends ProcessDeps, FilesDeps {
  init: InitRoute;
  metrics: MetricsReader;
  log: (message: string) => void;
}

type Handler = (
  request: IncomingMessage,
  response: ServerResponse,
  query: URLSearchParams,
) => Promise<void> | void;

export function createEnvdServer(deps: ServerDeps): Server {
  const rpc = new ConnectServer(deps.log);
  rpc.add(processWire.Process, processMethods(deps));
  rpc.add(filesystemWire.Filesystem, filesystemMethods(deps));

  /** These check by themselves who calls. */
  const open: Record<string, Handler> = {
    "GET /health": (_request, response) => sendNothing(response),
    "POST /init": (request, response) => deps.init.handle(request, response),
    "GET /files": (request, response, query) => getFile(request, response, query, deps),
    "POST /files": (request, response, query) => postFiles(request, response, query, deps),
  };
  const guarded: Record<string, Handler> = {
    "GET /metrics": (_request, response) => sendJson(response, 200, deps.metrics.read()),
    "GET /envs": (_request, response) => sendJson(response, 200, deps.state.settings?.envVars ?? {}),
  };

  const answer = async (request: IncomingMessage, response: ServerResponse): Promise<void> => {
    const [path = "", ...queryParts] = (request.url ?? "").split("?");
    const route = `${request.method} ${path}`;
    const query = new URLSearchParams(queryParts.join("?"));
    const handler = open[route];
    if (handler !== undefined) return handler(request, response, query);
    if (!deps.state.isAccessToken(request.headers["x-access-token"]?.toString())) {
      throw new HttpError(
        401,
        "unauthorized access, please provide a valid access token or method signing if supported",
      );
    }
    const guardedHandler = guarded[route];
    if (guardedHandler !== undefined) return guardedHandler(request, response, query);
    if (!rpc.has(path)) throw new HttpError(404, "no such endpoint");
    return rpc.serve(path, request, response);
  };

  const server = createServer(
    {
      maxHeaderSize: MAX_HEADER_BYTES,
      headersTimeout: 0,
      requestTimeout: 0,
      connectionsCheckingInterval: MAX_TIMEOUT_MS,
      keepAliveTimeout: IDLE_CONNECTION_MS,
      noDelay: true,
    },
    (request, response) => {
      limitBodyIdleness(request);
      answer(request, response).catch((error: unknown) => failed(request, response, error, deps.log));
    },
  );
  server.maxConnections = MAX_CONNECTIONS;
  server.on("connection", (socket: Socket) => socket.setTimeout(IDLE_CONNECTION_MS));
  return server;
}

/** A body that stands still ends its connection; an answer may be silent as long as it likes. */
function limitBodyIdleness(request: IncomingMessage): void {
  const { socket } = request;
  if (request.complete) {
    socket.setTimeout(0);
    return;
  }
  socket.setTimeout(BODY_IDLE_MS);
  request.once("end", () => socket.setTimeout(0));
}

async function failed(
  request: IncomingMessage,
  response: ServerResponse,
  error: unknown,
  log: (message: string) => void,
): Promise<void> {
  // Gone, or in the middle of an answer: all we can say is that it does not end well.
  if (response.headersSent || response.destroyed) {
    response.destroy();
    return;
  }
  if (!(error instanceof HttpError)) log(`${request.method} ${request.url}: ${describe(error)}`);
  const shown = error instanceof HttpError ? error : new HttpError(500, "internal error", { cause: error });
  if (request.complete) {
    sendError(response, shown);
    return;
  }
  // Closing on a sender in the middle of its body would reset the connection
  // before it has read the answer. So the answer goes first, then what still comes is read.
  response.setHeader("Connection", "close");
  const text = errorBody(shown);
  response.writeHead(shown.status, {
    "Content-Type": "application/json",
    "Content-Length": Buffer.byteLength(text),
  });
  response.write(text);
  let discarded = 0;
  request.on("data", (chunk: Buffer) => {
    discarded += chunk.byteLength;
    if (discarded > MAX_DISCARDED_BYTES) request.destroy();
  });
  request.once("close", () => response.end());
  request.resume();
}

function sendError(response: ServerResponse, error: HttpError): void {
  const text = errorBody(error);
  response.writeHead(error.status, {
    "Content-Type": "application/json",
    "Content-Length": Buffer.byteLength(text),
  });
  response.end(text);
}

/** `code` is the HTTP status, as E2B's clients expect it; Connect clients fall back to the status. */
function errorBody({ status, message }: HttpError): string {
  return JSON.stringify({ code: status, message });
}

function describe(error: unknown): string {
  return error instanceof Error ? (error.stack ?? error.message) : String(error);
}
