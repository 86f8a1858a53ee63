/**
 * POST /v1/sandboxes/{id}/files/write and /read: bytes in and out, streamed both
 * ways with the slower side setting the pace.
 */
import { RookeryError } from "@rookery/protocol/errors";
import type { FastifyRequest } from "fastify";
import { Readable } from "node:stream";
import { z } from "zod";
import type { Services } from "../../service/services.ts";
import { callerOf } from "../authentication.ts";
import { ClientGone, clientSignal } from "../client-signal.ts";
import type { Api, ApiLimits } from "../context.ts";
import { readMultipart } from "../multipart-upload.ts";
import { ReadFile, SandboxParams, WriteFileQuery } from "../schemas/sandboxes.ts";
import { readRawUpload, refuseTooLarge } from "../upload.ts";
import type { Upload } from "../upload.ts";

const tags = ["commands and files"];
const FILE_ERRORS = [
  "wrong_state",
  "invalid_path",
  "host_error",
  "guest_error",
  "host_unreachable",
  "timeout",
] as const;
const OCTETS = "application/octet-stream";
const FORM = "multipart/form-data";

const binary = { type: "string", format: "binary" } as const;

/** A scope of its own: only here bodies are taken that are not JSON. */
export async function writeFileRoute(app: Api, services: Services, limits: ApiLimits): Promise<void> {
  app.removeAllContentTypeParsers();
  for (const type of [FORM, OCTETS]) {
    app.addContentTypeParser(
      type,
      (_request: FastifyRequest, _payload: unknown, done: (error: null) => void) => done(null),
    );
  }
  app.post(
    "/v1/sandboxes/:id/files/write",
    {
      config: {
        access: "key",
        errors: [...FILE_ERRORS, "out_of_disk"],
        rawBody: {
          [FORM]: {
            type: "object",
            description: "path must stand before file.",
            required: ["path", "file"],
            properties: { path: { type: "string" }, file: binary },
          },
          [OCTETS]: binary,
        },
      },
      schema: {
        tags,
        operationId: "writeFile",
        summary: "Write a file, whole or not at all",
        description: "The file is path and file of a form, or the body, with its path in the query.",
        params: SandboxParams,
        querystring: WriteFileQuery,
        response: { 204: z.undefined().describe("Written.") },
      },
    },
    async (request, reply) => {
      refuseTooLarge(request.raw, limits);
      const signal = clientSignal(reply);
      using upload = await openUpload(request, request.query.path, limits);
      const torn = new AbortController();
      try {
        await services.writeFile(
          callerOf(request),
          request.params.id,
          upload.path,
          abortingWhenTorn(upload.content, torn),
          AbortSignal.any([signal, torn.signal]),
        );
      } catch (error) {
        // Whatever the service makes of the tear, the caller is told the tear itself.
        throw torn.signal.aborted ? torn.signal.reason : error;
      }
      return reply.code(204).send();
    },
  );
}

async function* abortingWhenTorn(
  content: AsyncIterable<Uint8Array>,
  torn: AbortController,
): AsyncGenerator<Uint8Array> {
  try {
    yield* content;
  } catch (error) {
    torn.abort(error);
    throw error;
  }
}

async function openUpload(
  request: FastifyRequest,
  path: string | undefined,
  limits: ApiLimits,
): Promise<Upload> {
  const type = request.headers["content-type"] ?? "";
  return type.toLowerCase().startsWith(FORM)
    ? readMultipart(request.raw, limits)
    : readRawUpload(request.raw, path, limits);
}

export async function readFileRoute(app: Api, services: Services): Promise<void> {
  app.post(
    "/v1/sandboxes/:id/files/read",
    {
      config: { access: "key", errors: [...FILE_ERRORS, "file_not_found"] },
      schema: {
        tags,
        operationId: "readFile",
        summary: "Read a file",
        description: "A failure in the middle closes the connection before the end of the body.",
        params: SandboxParams,
        body: ReadFile,
        response: {
          200: {
            description: "Its bytes.",
            content: { [OCTETS]: { schema: z.custom<Readable>().meta(binary) } },
          },
        },
      },
    },
    async (request, reply) => {
      const signal = clientSignal(reply);
      const { sizeBytes, content } = await services.readFile(
        callerOf(request),
        request.params.id,
        request.body.path,
        signal,
      );
      const chunks = content[Symbol.asyncIterator]();
      // Before the answer has begun, a failure can still be told properly.
      const first = await chunks.next();
      if (signal.aborted) throw new ClientGone("the caller closed the connection");
      reply.type(OCTETS).header("content-disposition", "attachment");
      if (sizeBytes !== undefined) reply.header("content-length", String(sizeBytes));
      return reply.send(Readable.from(resumed(first, chunks, sizeBytes), { objectMode: false }));
    },
  );
}

/** The stream from its first chunk on, exactly as long as was said: a lie tears the connection. */
async function* resumed(
  first: IteratorResult<Uint8Array, unknown>,
  chunks: AsyncIterator<Uint8Array, unknown>,
  sizeBytes: number | undefined,
): AsyncGenerator<Uint8Array> {
  let bytes = 0;
  let next = first;
  try {
    for (; next.done !== true; next = await chunks.next()) {
      bytes += next.value.byteLength;
      if (sizeBytes !== undefined && bytes > sizeBytes)
        throw lied(`the file is longer than the ${sizeBytes} bytes that the guest said`);
      yield next.value;
    }
  } finally {
    if (next.done !== true) await chunks.return?.();
  }
  if (sizeBytes !== undefined && bytes < sizeBytes)
    throw lied(`the file ended after ${bytes} of ${sizeBytes} bytes`);
}

function lied(message: string): RookeryError {
  return new RookeryError("guest_error", message);
}
