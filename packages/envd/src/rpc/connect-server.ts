/**
 * The server half of the Connect protocol over HTTP/1.1, as far as envd's
 * services need it: POST, both codecs, unary calls and streams in one
 * direction, no compression.
 *
 * Ours, because @connectrpc/connect-node cost more than the calls themselves:
 * 1.5 ms of CPU for a stream on the host and ten times that under emulation,
 * where each exec waits for it (docs/adr). Its client is what the tests use.
 */
import { once } from "node:events";
import type { IncomingMessage, ServerResponse } from "node:http";
import type {
  DescMessage,
  DescMethod,
  DescService,
  MessageInitShape,
  MessageShape,
} from "@bufbuild/protobuf";
import { Code, ConnectError } from "@connectrpc/connect";
import { codeToHttpStatus, errorToJson } from "@connectrpc/connect/protocol-connect";
import { MAX_MESSAGE_BYTES } from "../limits.ts";
import { parseContentType } from "./codec.ts";
import type { Codec } from "./codec.ts";
import { FLAG_END, FrameReader, frameOf } from "./frames.ts";
import { RpcContext } from "./rpc-context.ts";

type Unary<I extends DescMessage, O extends DescMessage> = (
  request: MessageShape<I>,
  context: RpcContext,
) => MessageInitShape<O> | Promise<MessageInitShape<O>>;
type ServerStream<I extends DescMessage, O extends DescMessage> = (
  request: MessageShape<I>,
  context: RpcContext,
) => AsyncIterable<MessageInitShape<O>>;
type ClientStream<I extends DescMessage, O extends DescMessage> = (
  requests: AsyncIterable<MessageShape<I>>,
  context: RpcContext,
) => Promise<MessageInitShape<O>>;

type MethodOf<M> = M extends { methodKind: infer K; input: infer I; output: infer O }
  ? I extends DescMessage
    ? O extends DescMessage
      ? K extends "unary"
        ? Unary<I, O>
        : K extends "server_streaming"
          ? ServerStream<I, O>
          : K extends "client_streaming"
            ? ClientStream<I, O>
            : never
      : never
    : never
  : never;

/** One function for each method of a service. */
export type ServiceMethods<S extends DescService> = { [P in keyof S["method"]]: MethodOf<S["method"][P]> };

type AnyMethod = (request: never, context: RpcContext) => unknown;
type Exchange = { request: IncomingMessage; response: ServerResponse; codec: Codec; context: RpcContext };

/** Answers calls by their path; false when a path is no method's. */
export class ConnectServer {
  readonly #methods = new Map<string, { desc: DescMethod; run: AnyMethod }>();
  readonly #log: (message: string) => void;

  constructor(log: (message: string) => void) {
    this.#log = log;
  }

  add<S extends DescService>(service: S, methods: ServiceMethods<S>): void {
    const byName: Record<string, AnyMethod> = methods;
    for (const desc of service.methods) {
      this.#methods.set(`/${service.typeName}/${desc.name}`, { desc, run: byName[desc.localName]! });
    }
  }

  has(path: string): boolean {
    return this.#methods.has(path);
  }

  /** Rejects only when the connection fails. */
  async serve(path: string, request: IncomingMessage, response: ServerResponse): Promise<void> {
    const { desc, run } = this.#methods.get(path)!;
    const type = parseContentType(request.headers["content-type"]);
    if (request.method !== "POST" || type?.stream !== (desc.methodKind !== "unary")) {
      // What the protocol asks for, so that other protocols' clients see that theirs is not spoken.
      const refusal = request.method === "POST" ? 415 : 405;
      response.writeHead(refusal, { Allow: "POST", "Accept-Post": "application/json, application/proto" });
      response.end();
      return;
    }
    const { codec } = type;
    let context: RpcContext;
    try {
      context = new RpcContext(request.headers, response);
    } catch (error) {
      this.#fail(type.stream, error, response);
      return;
    }
    const exchange: Exchange = { request, response, codec, context };
    try {
      if (desc.methodKind === "unary")
        await this.#unary(desc, run as Unary<DescMessage, DescMessage>, exchange);
      else if (desc.methodKind === "server_streaming") {
        await this.#serverStream(desc, run as ServerStream<DescMessage, DescMessage>, exchange);
      } else await this.#clientStream(desc, run as ClientStream<DescMessage, DescMessage>, exchange);
    } catch (error) {
      this.#fail(type.stream, error, response);
    } finally {
      context.end();
    }
  }

  async #unary(desc: DescMethod, run: Unary<DescMessage, DescMessage>, exchange: Exchange): Promise<void> {
    const { request, response, codec, context } = exchange;
    const encoding = request.headers["content-encoding"];
    if (encoding !== undefined && encoding !== "identity") {
      throw new ConnectError("compressed messages are not supported", Code.Unimplemented);
    }
    const message = codec.decode(desc.input, await readBody(request, MAX_MESSAGE_BYTES));
    const body = codec.encode(desc.output, await run(message, context));
    response.writeHead(200, {
      "Content-Type": request.headers["content-type"],
      "Content-Length": body.byteLength,
    });
    response.end(body);
  }

  async #serverStream(
    desc: DescMethod,
    run: ServerStream<DescMessage, DescMessage>,
    { request, response, codec, context }: Exchange,
  ): Promise<void> {
    const frames = new FrameReader(MAX_MESSAGE_BYTES);
    const messages = [...frames.push(await readBody(request, 2 * MAX_MESSAGE_BYTES))];
    frames.finish();
    if (messages.length !== 1) {
      throw new ConnectError(`one message is expected, not ${messages.length}`, Code.InvalidArgument);
    }
    startStream(response);
    for await (const output of run(codec.decode(desc.input, messages[0]!), context)) {
      if (!response.write(frameOf(0, codec.encode(desc.output, output)))) await drained(response);
      // Leaving the loop tells the method to let go.
      if (response.destroyed) return;
    }
    response.end(END_OF_STREAM);
  }

  async #clientStream(
    desc: DescMethod,
    run: ClientStream<DescMessage, DescMessage>,
    { request, response, codec, context }: Exchange,
  ): Promise<void> {
    async function* messages(): AsyncGenerator<MessageShape<DescMessage>> {
      const frames = new FrameReader(MAX_MESSAGE_BYTES);
      const chunks: AsyncIterable<Buffer> = request.iterator({ destroyOnReturn: false });
      for await (const chunk of chunks) {
        for (const message of frames.push(chunk)) yield codec.decode(desc.input, message);
      }
      frames.finish();
    }
    const output = await run(messages(), context);
    startStream(response);
    response.write(frameOf(0, codec.encode(desc.output, output)));
    response.end(END_OF_STREAM);
  }

  #fail(stream: boolean, thrown: unknown, response: ServerResponse): void {
    if (response.destroyed) return;
    if (!(thrown instanceof ConnectError)) {
      this.#log(thrown instanceof Error ? (thrown.stack ?? thrown.message) : String(thrown));
    }
    const error = thrown instanceof ConnectError ? thrown : new ConnectError("internal error", Code.Internal);
    const json = errorToJson(error, undefined);
    // A request that is still being sent is not waited for.
    if (!response.headersSent && !response.req.complete) response.setHeader("Connection", "close");
    if (stream) {
      startStream(response);
      response.end(frameOf(FLAG_END, Buffer.from(JSON.stringify({ error: json }))));
      return;
    }
    const body = JSON.stringify(json);
    response.writeHead(codeToHttpStatus(error.code), {
      "Content-Type": "application/json",
      "Content-Length": Buffer.byteLength(body),
    });
    response.end(body);
  }
}

const END_OF_STREAM = frameOf(FLAG_END, Buffer.from("{}"));

/** Streams answer 200 whatever happens; how they ended is in their last frame. */
function startStream(response: ServerResponse): void {
  if (response.headersSent) return;
  response.writeHead(200, { "Content-Type": response.req.headers["content-type"] });
}

async function drained(response: ServerResponse): Promise<void> {
  if (response.destroyed) return;
  const waiting = new AbortController();
  const { signal } = waiting;
  try {
    await Promise.race([once(response, "drain", { signal }), once(response, "close", { signal })]);
  } finally {
    waiting.abort();
  }
}

function readBody(request: IncomingMessage, maxBytes: number): Promise<Buffer> {
  return new Promise((resolve, reject) => {
    const chunks: Buffer[] = [];
    let bytes = 0;
    request.on("data", (chunk: Buffer) => {
      bytes += chunk.byteLength;
      if (bytes > maxBytes) {
        reject(new ConnectError(`the request exceeds ${maxBytes} bytes`, Code.ResourceExhausted));
      } else chunks.push(chunk);
    });
    request.once("end", () => resolve(chunks.length === 1 ? chunks[0]! : Buffer.concat(chunks)));
    request.once("error", reject);
    request.once("close", () => reject(new ConnectError("the client went away", Code.Canceled)));
  });
}
