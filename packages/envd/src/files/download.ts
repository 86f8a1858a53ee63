/** GET /files: the bytes of one file. */
import { closeSync, constants, createReadStream, fstatSync, openSync, readSync, statSync } from "node:fs";
import type { Stats } from "node:fs";
import type { IncomingMessage, ServerResponse } from "node:http";
import { pipeline } from "node:stream/promises";
import { createGzip } from "node:zlib";
import { HttpError, errnoOf, systemMessage } from "../errors.ts";
import { READ_CHUNK_BYTES } from "../limits.ts";
import { negotiateEncoding } from "./encoding.ts";
import { parseRange } from "./range.ts";

export async function sendFile(
  path: string,
  request: IncomingMessage,
  response: ServerResponse,
): Promise<void> {
  const { headers } = request;
  checkIsFile(path, statFile(path));
  const encoding = negotiateEncoding(headers["accept-encoding"]);
  // A FIFO that took the file's place meanwhile must not block a thread for ever.
  const fd = openFile(path);
  let stat: Stats;
  try {
    stat = fstatSync(fd);
    checkIsFile(path, stat);
  } catch (error) {
    closeSync(fd);
    throw error;
  }

  response.setHeader("Vary", "Accept-Encoding");
  response.setHeader("Content-Type", "application/octet-stream");
  response.setHeader("Last-Modified", stat.mtime.toUTCString());
  if (notModified(headers, stat)) {
    closeSync(fd);
    response.writeHead(304).end();
    return;
  }
  // Files of /proc have size 0 and content all the same.
  if (stat.size === 0) return sendUnsized(fd, response);

  const range = useRange(headers, stat) ? parseRange(headers.range, stat.size) : "whole";
  if (range === "unsatisfiable") {
    closeSync(fd);
    response.setHeader("Content-Range", `bytes */${stat.size}`);
    throw new HttpError(416, `range '${headers.range}' is not in the file of ${stat.size} bytes`);
  }
  if (range === "whole" && headers.range === undefined && encoding === "gzip") {
    response.setHeader("Content-Encoding", "gzip");
    const stream = createReadStream("", { fd, highWaterMark: READ_CHUNK_BYTES });
    // The fastest level: the guest's CPU is dearer than its network.
    await pipeline(stream, createGzip({ level: 1 }), response);
    return;
  }
  const { start, end } = range === "whole" ? { start: 0, end: stat.size - 1 } : range;
  response.setHeader("Accept-Ranges", "bytes");
  response.setHeader("Content-Length", end - start + 1);
  if (range !== "whole") response.setHeader("Content-Range", `bytes ${start}-${end}/${stat.size}`);
  response.statusCode = range === "whole" ? 200 : 206;
  // A file that shrinks meanwhile ends the connection: the promised length cannot be kept.
  await pipeline(createReadStream("", { fd, start, end, highWaterMark: READ_CHUNK_BYTES }), response);
}

async function sendUnsized(fd: number, response: ServerResponse): Promise<void> {
  const first = Buffer.alloc(READ_CHUNK_BYTES);
  let length: number;
  try {
    length = readSync(fd, first, 0, first.byteLength, null);
  } catch (error) {
    closeSync(fd);
    throw new HttpError(500, `error reading file: ${systemMessage(error)}`, { cause: error });
  }
  if (length === 0) {
    closeSync(fd);
    response.setHeader("Content-Length", 0);
    response.end();
    return;
  }
  response.write(first.subarray(0, length));
  await pipeline(createReadStream("", { fd, highWaterMark: READ_CHUNK_BYTES }), response);
}

function statFile(path: string): Stats {
  try {
    return statSync(path);
  } catch (error) {
    const errno = errnoOf(error);
    if (errno === "ENOENT" || errno === "ENOTDIR") {
      throw new HttpError(404, `path '${path}' does not exist`, { cause: error });
    }
    const status = errno === "ELOOP" || errno === "ENAMETOOLONG" ? 400 : 500;
    throw new HttpError(status, `error checking if path exists '${path}': ${systemMessage(error)}`, {
      cause: error,
    });
  }
}

function checkIsFile(path: string, stat: Stats): void {
  if (stat.isDirectory()) throw new HttpError(400, `path '${path}' is a directory`);
  if (!stat.isFile()) throw new HttpError(400, `path '${path}' is not a regular file`);
}

function openFile(path: string): number {
  try {
    return openSync(path, constants.O_RDONLY | constants.O_NONBLOCK);
  } catch (error) {
    const status = errnoOf(error) === "ENOENT" ? 404 : 500;
    throw new HttpError(status, `error opening file '${path}': ${systemMessage(error)}`, { cause: error });
  }
}

/** HTTP's dates have whole seconds. */
function secondsOf(stat: Stats): number {
  return Math.floor(stat.mtimeMs / 1000);
}

function notModified(headers: IncomingMessage["headers"], stat: Stats): boolean {
  const since = Date.parse(headers["if-modified-since"] ?? "");
  return !Number.isNaN(since) && secondsOf(stat) <= Math.floor(since / 1000);
}

/** A range of a file that has changed since the client's first part would be a mixture of two files. */
function useRange(headers: IncomingMessage["headers"], stat: Stats): boolean {
  const condition = headers["if-range"];
  return condition === undefined || Math.floor(Date.parse(String(condition)) / 1000) === secondsOf(stat);
}
