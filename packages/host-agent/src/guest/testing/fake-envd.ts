/**
 * An HTTP server in the place of a guest's envd, for tests: answers what the
 * test says, honest or not. It speaks raw HTTP/1.1 where Node's own server
 * would be too polite.
 */
import { createServer } from "node:http";
import type { IncomingMessage, ServerResponse } from "node:http";
import { create, fromBinary, toBinary } from "@bufbuild/protobuf";
import type { MessageInitShape } from "@bufbuild/protobuf";
import { process as wire } from "@rookery/protocol/envd";
import { frameOf } from "../envelope.ts";
import type { EnvdTarget } from "../../sandbox-manager/sandbox.ts";

export interface FakeEnvd extends AsyncDisposable {
  target: EnvdTarget;
  /** "METHOD /path" of every request, in order of arrival. */
  requests: string[];
}

export type Answer = (request: IncomingMessage, response: ServerResponse) => void | Promise<void>;

/** `answers` by "METHOD /path" without query; all else is a 404. */
export async function startFakeEnvd(answers: Record<string, Answer>): Promise<FakeEnvd> {
  const requests: string[] = [];
  const server = createServer((request, response) => {
    const route = `${request.method} ${request.url!.split("?", 1)[0]!}`;
    requests.push(`${request.method} ${request.url}`);
    const answer = answers[route];
    if (answer === undefined) {
      response.writeHead(404, { "content-type": "application/json" });
      response.end('{"code":"not_found","message":"no such route"}');
      return;
    }
    Promise.resolve(answer(request, response)).catch(() => response.destroy());
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const address = server.address();
  if (address === null || typeof address === "string") throw new Error("no port");
  return {
    target: { host: "127.0.0.1", port: address.port, accessToken: "token" },
    requests,
    async [Symbol.asyncDispose]() {
      server.closeAllConnections();
      await new Promise((resolve) => server.close(resolve));
    },
  };
}

export function beginStream(response: ServerResponse): void {
  response.writeHead(200, { "content-type": "application/connect+proto" });
}

export function eventFrame(event: MessageInitShape<typeof wire.ProcessEventSchema>): Buffer {
  return frameOf(toBinary(wire.StartResponseSchema, create(wire.StartResponseSchema, { event })));
}

export function startFrame(pid: number): Buffer {
  return eventFrame({ event: { case: "start", value: { pid } } });
}

export function stdoutFrame(data: Uint8Array): Buffer {
  return eventFrame({ event: { case: "data", value: { output: { case: "stdout", value: data } } } });
}

export function exitFrame(exitCode: number): Buffer {
  return eventFrame({
    event: { case: "end", value: { exitCode, exited: true, status: `exit status ${exitCode}` } },
  });
}

export function killedFrame(): Buffer {
  return eventFrame({
    event: { case: "end", value: { exitCode: -1, exited: false, status: "signal: killed" } },
  });
}

export function lastFrame(json = "{}"): Buffer {
  const frame = frameOf(Buffer.from(json));
  frame.writeUInt8(2, 0);
  return frame;
}

export async function readBody(request: IncomingMessage): Promise<Buffer> {
  const parts: Buffer[] = [];
  for await (const part of request) parts.push(part as Buffer);
  return Buffer.concat(parts);
}

/** The Start request of a call. */
export async function readStart(request: IncomingMessage) {
  return fromBinary(wire.StartRequestSchema, (await readBody(request)).subarray(5));
}
