/**
 * An S3-compatible store. Requests are signed by the SDK, retried by it with
 * back-off, and bound in time; the body of a download is bound by who reads it.
 *
 * Content is sent in parts of known length, so that a part can be sent again
 * and an object may be larger than what one request takes. An upload that died
 * leaves parts that nobody sees: the bucket's lifecycle rule for incomplete
 * uploads takes them away (docs/operations.md).
 */
import { createHash } from "node:crypto";
import type { Readable } from "node:stream";
import {
  AbortMultipartUploadCommand,
  CompleteMultipartUploadCommand,
  CreateMultipartUploadCommand,
  DeleteObjectCommand,
  GetObjectCommand,
  HeadObjectCommand,
  ListObjectsV2Command,
  PutObjectCommand,
  S3Client,
  S3ServiceException,
  UploadPartCommand,
} from "@aws-sdk/client-s3";
import {
  assertKey,
  storeAway,
  type ObjectFacts,
  type ObjectStore,
  type StoredObject,
} from "./object-store.ts";

export interface S3Options {
  bucket: string;
  /** Without a slash at either end; empty: none. */
  prefix: string;
  region: string;
  /** Undefined: AWS. */
  endpoint: string | undefined;
  /** Undefined: what the SDK finds in the environment, such as the machine's role. */
  credentials:
    | { accessKeyId: string; secretAccessKey: string; sessionToken?: string | undefined }
    | undefined;
  /** Of one request, without the body of an answer. */
  requestTimeoutMs?: number;
  attempts?: number;
  /** At least 5 MiB, which S3 asks for; 10,000 of them are the largest object. */
  partBytes?: number;
}

const CONNECT_TIMEOUT_MS = 5_000;
const REQUEST_TIMEOUT_MS = 60_000;
const ATTEMPTS = 5;
const PART_BYTES = 16 << 20;
const PAGE = 1_000;
/** Taking an upload back is not bound by the signal that ended it. */
const ABORT_TIMEOUT_MS = 10_000;

export class S3Store implements ObjectStore {
  readonly kind = "s3";
  readonly #client: S3Client;
  readonly #options: S3Options;
  readonly #partBytes: number;

  constructor(options: S3Options) {
    this.#options = options;
    this.#partBytes = options.partBytes ?? PART_BYTES;
    const { credentials } = options;
    this.#client = new S3Client({
      region: options.region,
      ...(options.endpoint !== undefined && { endpoint: options.endpoint, forcePathStyle: true }),
      ...(credentials !== undefined && {
        credentials: {
          accessKeyId: credentials.accessKeyId,
          secretAccessKey: credentials.secretAccessKey,
          ...(credentials.sessionToken !== undefined && { sessionToken: credentials.sessionToken }),
        },
      }),
      maxAttempts: options.attempts ?? ATTEMPTS,
      // Many compatible servers know no others.
      requestChecksumCalculation: "WHEN_REQUIRED",
      responseChecksumValidation: "WHEN_REQUIRED",
      requestHandler: {
        connectionTimeout: CONNECT_TIMEOUT_MS,
        requestTimeout: options.requestTimeoutMs ?? REQUEST_TIMEOUT_MS,
        throwOnRequestTimeout: true,
      },
    });
  }

  async identity(): Promise<string> {
    const { endpoint, region, bucket, prefix } = this.#options;
    const where = endpoint === undefined ? `aws ${region}` : new URL(endpoint).origin;
    return createHash("sha256")
      .update(JSON.stringify(["s3", where, bucket, prefix]))
      .digest("hex");
  }

  async head(key: string, signal: AbortSignal): Promise<ObjectFacts | undefined> {
    return await this.#ask(key, signal, async (at) => {
      return factsOf(await this.#client.send(new HeadObjectCommand(at), { abortSignal: signal }));
    });
  }

  async put(key: string, content: AsyncIterable<Uint8Array>, signal: AbortSignal): Promise<void> {
    const parts = inParts(content, this.#partBytes);
    const first = await parts.next();
    const second = first.done === true ? first : await parts.next();
    if (second.done === true) {
      const body = first.done === true ? new Uint8Array() : first.value;
      await this.#send(key, signal, (at) =>
        this.#client.send(new PutObjectCommand({ ...at, Body: body }), { abortSignal: signal }),
      );
      return;
    }
    const begun = await this.#send(key, signal, (at) =>
      this.#client.send(new CreateMultipartUploadCommand(at), { abortSignal: signal }),
    );
    const uploadId = begun.UploadId;
    try {
      const done: { PartNumber: number; ETag: string | undefined }[] = [];
      const sendPart = async (part: Uint8Array): Promise<void> => {
        signal.throwIfAborted();
        const number = done.length + 1;
        const sent = await this.#send(key, signal, (at) =>
          this.#client.send(
            new UploadPartCommand({ ...at, UploadId: uploadId, PartNumber: number, Body: part }),
            { abortSignal: signal },
          ),
        );
        done.push({ PartNumber: number, ETag: sent.ETag });
      };
      await sendPart(first.value!);
      await sendPart(second.value);
      for await (const part of parts) await sendPart(part);
      signal.throwIfAborted();
      await this.#send(key, signal, (at) =>
        this.#client.send(
          new CompleteMultipartUploadCommand({ ...at, UploadId: uploadId, MultipartUpload: { Parts: done } }),
          { abortSignal: signal },
        ),
      );
    } catch (cause) {
      await this.#client
        .send(new AbortMultipartUploadCommand({ ...this.#at(key), UploadId: uploadId }), {
          abortSignal: AbortSignal.timeout(ABORT_TIMEOUT_MS),
        })
        .catch(() => undefined); // the first failure is the one to tell; the bucket's lifecycle ends the rest
      throw cause;
    }
  }

  async get(key: string, { from }: { from: number }, signal: AbortSignal): Promise<StoredObject | undefined> {
    return await this.#ask(key, signal, async (at) => {
      const range = from > 0 ? { Range: `bytes=${from}-` } : {};
      const answer = await this.#client.send(new GetObjectCommand({ ...at, ...range }), {
        abortSignal: signal,
      });
      const facts = factsOf(answer);
      const total = /\/(\d+)$/.exec(answer.ContentRange ?? "")?.[1];
      if (from > 0 && total === undefined) throw new Error("a server that does not know ranges");
      // In Node.
      const body = answer.Body as Readable;
      const destroy = (): void => void body.destroy(signal.reason);
      signal.addEventListener("abort", destroy, { once: true });
      body.once("close", () => signal.removeEventListener("abort", destroy));
      body.on("error", () => undefined); // seen by who reads it; nobody may
      return { facts: total === undefined ? facts : { ...facts, bytes: Number(total) }, body };
    });
  }

  async *list(
    prefix: string,
    signal: AbortSignal,
  ): AsyncGenerator<{ key: string; bytes: number; modifiedMs: number }> {
    const own = this.#options.prefix === "" ? "" : `${this.#options.prefix}/`;
    let token: string | undefined;
    do {
      const page = await this.#send(undefined, signal, ({ Bucket }) =>
        this.#client.send(
          new ListObjectsV2Command({
            Bucket,
            Prefix: `${own}${prefix}`,
            MaxKeys: PAGE,
            ...(token !== undefined && { ContinuationToken: token }),
          }),
          { abortSignal: signal },
        ),
      );
      for (const { Key, Size, LastModified } of page.Contents ?? []) {
        if (Key === undefined || Size === undefined || LastModified === undefined) continue;
        yield { key: Key.slice(own.length), bytes: Size, modifiedMs: LastModified.getTime() };
      }
      token = page.IsTruncated === true ? page.NextContinuationToken : undefined;
    } while (token !== undefined);
  }

  async delete(key: string, signal: AbortSignal): Promise<void> {
    await this.#ask(key, signal, (at) =>
      this.#client.send(new DeleteObjectCommand(at), { abortSignal: signal }),
    );
  }

  close(): void {
    this.#client.destroy();
  }

  #at(key: string): { Bucket: string; Key: string } {
    assertKey(key);
    const { bucket, prefix } = this.#options;
    return { Bucket: bucket, Key: prefix === "" ? key : `${prefix}/${key}` };
  }

  /** Undefined: there is no such object. */
  async #ask<T>(
    key: string,
    signal: AbortSignal,
    work: (at: { Bucket: string; Key: string }) => Promise<T>,
  ): Promise<T | undefined> {
    return await this.#send(key, signal, async (at) => {
      try {
        return await work(at);
      } catch (cause) {
        if (isMissing(cause)) return undefined;
        throw cause;
      }
    });
  }

  async #send<T>(
    key: string | undefined,
    signal: AbortSignal,
    work: (at: { Bucket: string; Key: string }) => Promise<T>,
  ): Promise<T> {
    const at = key === undefined ? { Bucket: this.#options.bucket, Key: "" } : this.#at(key);
    try {
      return await work(at);
    } catch (cause) {
      signal.throwIfAborted();
      throw storeAway(key ?? "listing", plainCause(cause));
    }
  }
}

/** A bucket that is missing is a fault of the store, not an absent object. */
function isMissing(cause: unknown): boolean {
  if (!(cause instanceof S3ServiceException)) return false;
  return cause.name === "NoSuchKey" || cause.name === "NotFound";
}

/** The SDK's errors carry the request, and with it what it was signed with: none of that goes into a log. */
function plainCause(cause: unknown): Error {
  if (!(cause instanceof Error)) return new Error("unknown");
  const metadata = cause instanceof S3ServiceException ? cause.$metadata : undefined;
  const status = metadata?.httpStatusCode;
  return new Error(`${cause.name}: ${cause.message}${status === undefined ? "" : ` (HTTP ${status})`}`);
}

function factsOf(answer: {
  ContentLength?: number | undefined;
  ETag?: string | undefined;
  LastModified?: Date | undefined;
}): ObjectFacts {
  const { ContentLength, ETag, LastModified } = answer;
  if (ContentLength === undefined || ETag === undefined || LastModified === undefined) {
    throw new Error("an answer without length, tag or date");
  }
  return { bytes: ContentLength, tag: ETag, modifiedMs: LastModified.getTime() };
}

/** Pieces of exactly `partBytes`, but for the last; each its own memory. */
async function* inParts(
  content: AsyncIterable<Uint8Array>,
  partBytes: number,
): AsyncGenerator<Uint8Array, undefined> {
  let part = Buffer.allocUnsafe(partBytes);
  let filled = 0;
  for await (const piece of content) {
    for (let at = 0; at < piece.length;) {
      const bytes = Math.min(partBytes - filled, piece.length - at);
      part.set(piece.subarray(at, at + bytes), filled);
      filled += bytes;
      at += bytes;
      if (filled < partBytes) continue;
      yield part;
      part = Buffer.allocUnsafe(partBytes);
      filled = 0;
    }
  }
  if (filled > 0) yield part.subarray(0, filled);
  return undefined;
}
