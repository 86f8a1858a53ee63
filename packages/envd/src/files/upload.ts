/** POST /files: one file as the body, or several as multipart/form-data. */
import { once } from "node:events";
import type { IncomingMessage } from "node:http";
import { posix } from "node:path";
import type { Readable } from "node:stream";
import { createGunzip } from "node:zlib";
import { Busboy } from "@fastify/busboy";
import type { BusboyInstance } from "@fastify/busboy";
import { HttpError, errnoOf, messageOf } from "../errors.ts";
import { MAX_PATH_BYTES, MAX_UPLOAD_PARTS } from "../limits.ts";
import { parseContentEncoding } from "./encoding.ts";
import { parseMetadata } from "./metadata.ts";
import type { Metadata } from "./metadata.ts";
import { writeFile } from "./write-file.ts";
import type { WriteOptions } from "./write-file.ts";

export interface UploadedFile {
  path: string;
  name: string;
  type: "file";
  metadata?: Metadata;
}

export interface UploadOptions extends Omit<WriteOptions, "announcedBytes" | "metadata"> {
  /** The query's path: where the file goes; of a multipart body each part may name its own. */
  path: string | undefined;
  /** Makes a client's path absolute; throws HttpError. */
  resolve: (path: string) => string;
}

export async function receiveFiles(
  request: IncomingMessage,
  options: UploadOptions,
): Promise<UploadedFile[]> {
  const { headers } = request;
  const metadata = parseMetadata(headers);
  const length = Number(headers["content-length"]);
  const write: WriteOptions = {
    owner: options.owner,
    native: options.native,
    metadata,
    announcedBytes: Number.isNaN(length) ? undefined : length,
  };
  const body = decodedBody(request);
  const type = (headers["content-type"] ?? "").split(";", 1)[0]!.trim().toLowerCase();
  if (type === "application/octet-stream") {
    if (options.path === undefined) {
      throw new HttpError(400, "path query parameter is required for raw body upload");
    }
    const path = options.resolve(options.path);
    await rethrowBadBody(() => writeFile(path, leaveOpen(body), write));
    return [uploaded(path, metadata)];
  }
  if (type === "multipart/form-data") {
    return rethrowBadBody(() => receiveParts(body, headers, options, write));
  }
  throw new HttpError(
    400,
    `unsupported content type: ${headers["content-type"] ?? ""}, expected multipart/form-data or application/octet-stream`,
  );
}

function decodedBody(request: IncomingMessage): Readable {
  if (parseContentEncoding(request.headers["content-encoding"]) === "identity") return request;
  const gunzip = createGunzip();
  // A broken request breaks what reads from it; a reader's failure is for its caller to answer.
  request.once("error", (error) => gunzip.destroy(error));
  // It may fail before anybody reads from it; who reads then gets the error all the same.
  gunzip.on("error", () => undefined);
  return request.pipe(gunzip);
}

async function receiveParts(
  body: Readable,
  headers: IncomingMessage["headers"],
  { path: queryPath, resolve }: UploadOptions,
  write: WriteOptions,
): Promise<UploadedFile[]> {
  const files: UploadedFile[] = [];
  const parser = openParser(headers["content-type"]!);
  const failure = new AbortController();
  const fail = (error: unknown) => failure.abort(error);
  const taken = new Set<string>();
  let part: Readable | undefined;
  let writing: Promise<void> = Promise.resolve();
  parser.on("error", fail);
  for (const limit of ["partsLimit", "filesLimit", "fieldsLimit"] as const) {
    parser.on(limit, () => fail(new HttpError(400, `more than ${MAX_UPLOAD_PARTS} parts in one upload`)));
  }
  parser.on("file", (_field, stream, filename) => {
    part = stream;
    // A part that the body's end cuts off fails by itself.
    stream.on("error", fail);
    const previous = writing;
    const receive = async () => {
      // The parser goes on when it has read a part; that may not be under its name yet.
      await previous;
      const wanted = queryPath ?? filename;
      if (wanted === undefined || wanted === "") throw new HttpError(400, "a part names no file");
      const path = resolve(wanted);
      if (taken.has(path)) {
        throw new HttpError(
          400,
          `you cannot upload multiple files to the same path '${path}' in one upload request, only the first specified file was uploaded`,
        );
      }
      taken.add(path);
      await writeFile(path, stream, write);
      files.push(uploaded(path, write.metadata));
    };
    writing = receive();
    writing.catch(fail);
  });
  try {
    const { signal } = failure;
    for await (const chunk of leaveOpen(body)) {
      signal.throwIfAborted();
      if (!parser.write(chunk)) await once(parser, "drain", { signal });
    }
    signal.throwIfAborted();
    const finished = once(parser, "finish", { signal });
    parser.end();
    await finished;
    await writing;
  } catch (error) {
    const cause = failure.signal.aborted ? failure.signal.reason : error;
    // The writer removes its temporary file before it is over, and its failure is the cause or follows from it.
    part?.destroy(cause instanceof Error ? cause : undefined);
    await writing.catch(() => undefined);
    throw cause;
  }
  return files;
}

function openParser(contentType: string): BusboyInstance {
  try {
    return new Busboy({
      headers: { "content-type": contentType },
      preservePath: true,
      // With the query's path a part needs no file name.
      isPartAFile: (field) => field === "file",
      limits: {
        fieldNameSize: 256,
        fieldSize: MAX_PATH_BYTES,
        fields: MAX_UPLOAD_PARTS,
        files: MAX_UPLOAD_PARTS,
        parts: MAX_UPLOAD_PARTS,
        headerPairs: 64,
        headerSize: 2 * MAX_PATH_BYTES,
      },
    });
  } catch (error) {
    throw new HttpError(400, `error parsing multipart form: ${messageOf(error)}`, { cause: error });
  }
}

/** A loop over it that ends early does not destroy the request, on whose socket the answer must still go out. */
function leaveOpen(body: Readable): AsyncIterable<Uint8Array> {
  return body.iterator({ destroyOnReturn: false }) as AsyncIterable<Uint8Array>;
}

function uploaded(path: string, metadata: Metadata): UploadedFile {
  const file: UploadedFile = { path, name: posix.basename(path), type: "file" };
  return Object.keys(metadata).length === 0 ? file : { ...file, metadata };
}

/** What the client sent wrongly is its fault, whichever stream noticed. */
async function rethrowBadBody<T>(receive: () => Promise<T>): Promise<T> {
  try {
    return await receive();
  } catch (error) {
    const code = errnoOf(error);
    if (error instanceof HttpError) throw error;
    if (code?.startsWith("Z_")) {
      throw new HttpError(400, `error decompressing request body: ${messageOf(error)}`, {
        cause: error,
      });
    }
    const text = messageOf(error);
    if (/multipart|part terminated|form data/i.test(text)) {
      throw new HttpError(400, `error reading form: ${text}`, { cause: error });
    }
    throw error;
  }
}
