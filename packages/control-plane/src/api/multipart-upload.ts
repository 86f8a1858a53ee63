/**
 * Reads `path` and `file` out of a multipart form, the file as a stream.
 *
 * Invariant: `content` ends without an error only after the form's closing
 * delimiter has come and nothing else stood in the form. Whoever writes the file
 * therefore learns of a torn or wrong form before it takes the file as whole.
 *
 * `path` must stand before `file`: bytes without a place to go would have to be
 * kept somewhere.
 */
import { Busboy } from "@fastify/busboy";
import type { BusboyFileStream, BusboyInstance } from "@fastify/busboy";
import { RookeryError } from "@rookery/protocol/errors";
import type { IncomingMessage } from "node:http";
import type { Upload, UploadLimits } from "./upload.ts";
import { fileTooLarge, parseGuestPath, stalled } from "./upload.ts";
import { invalidField } from "./violations.ts";

/** Two parts and no more: the parser passes silently over parts that it can't name, but it counts them. */
const PART_LIMITS = { parts: 2, fieldSize: 16_384, headerPairs: 32, headerSize: 16_384 };
/** Of bytes between the parser and us. */
const FILE_WINDOW_BYTES = 256 * 1024;

export async function readMultipart(request: IncomingMessage, limits: UploadLimits): Promise<Upload> {
  const form = new Form(request, limits);
  try {
    const { path, file } = await form.begin();
    return { path, content: form.content(file), [Symbol.dispose]: () => form.end() };
  } catch (error) {
    form.end();
    throw error;
  }
}

class Form {
  readonly #request: IncomingMessage;
  readonly #limits: UploadLimits;
  readonly #parser: BusboyInstance;
  readonly #begun = Promise.withResolvers<{ path: string; file: BusboyFileStream }>();
  readonly #finished = Promise.withResolvers<void>();
  #path: string | undefined;
  #file: BusboyFileStream | undefined;
  #failure: Error | undefined;

  constructor(request: IncomingMessage, limits: UploadLimits) {
    this.#request = request;
    this.#limits = limits;
    this.#parser = openParser(request, limits);
    // Either may fail with nobody waiting for it yet.
    this.#begun.promise.catch(() => {});
    this.#finished.promise.catch(() => {});
    this.#parser.on("field", (name, value, _nameTruncated, valueTruncated) =>
      this.#guard(() => this.#onField(name, value, valueTruncated)),
    );
    this.#parser.on("file", (name, file) => this.#guard(() => this.#onFile(name, file), file));
    this.#parser.on("finish", () => this.#guard(() => this.#onFinish()));
    this.#parser.on("error", (cause) => this.#fail(malformed("the form is malformed or ended early", cause)));
    this.#parser.on("partsLimit", () => this.#fail(malformed("the form has more parts than path and file")));
    request.on("error", this.#onTorn).on("close", this.#onTorn);
    request.pipe(this.#parser);
  }

  begin(): Promise<{ path: string; file: BusboyFileStream }> {
    return this.#inTime(this.#begun.promise);
  }

  async *content(file: BusboyFileStream): AsyncGenerator<Uint8Array> {
    const chunks = file[Symbol.asyncIterator]() as AsyncIterator<Uint8Array>;
    for (;;) {
      const { done, value } = await this.#inTime(chunks.next());
      if (done === true) break;
      yield value;
    }
    await this.#inTime(this.#finished.promise);
  }

  /** Also in the middle: what is still to come is then nobody's. */
  end(): void {
    this.#request.off("error", this.#onTorn).off("close", this.#onTorn);
    this.#request.on("error", () => {});
    this.#request.unpipe(this.#parser);
    this.#parser.destroy();
    this.#file?.destroy();
  }

  #onField(name: string, value: string, isTruncated: boolean): void {
    if (name !== "path")
      throw invalidField(fieldName(name), "is not a field of this form: it has path and file");
    if (this.#path !== undefined) throw invalidField("path", "must be given once");
    if (this.#file !== undefined) throw invalidField("path", "must stand before file");
    if (isTruncated) throw invalidField("path", "is too long");
    this.#path = parseGuestPath(value);
  }

  #onFile(name: string, file: BusboyFileStream): void {
    if (name !== "file")
      throw invalidField(fieldName(name), "is not a field of this form: it has path and file");
    if (this.#file !== undefined) throw invalidField("file", "must be given once");
    if (this.#path === undefined) throw invalidField("path", "must stand before file");
    this.#file = file;
    file.on("limit", () => this.#fail(fileTooLarge(this.#limits)));
    file.on("error", (cause) => this.#fail(malformed("the form is malformed or ended early", cause)));
    this.#begun.resolve({ path: this.#path, file });
  }

  #onFinish(): void {
    if (this.#path === undefined) throw invalidField("path", "is required");
    if (this.#file === undefined) throw invalidField("file", "is required");
    this.#finished.resolve();
  }

  #guard(step: () => void, unwanted?: BusboyFileStream): void {
    if (this.#failure !== undefined) {
      unwanted?.on("error", () => {}).resume();
      return;
    }
    try {
      step();
    } catch (error) {
      unwanted?.on("error", () => {}).resume();
      this.#fail(error instanceof Error ? error : new Error("a thrown value", { cause: error }));
    }
  }

  readonly #onTorn = (): void => {
    if (!this.#request.complete) this.#fail(malformed("the connection closed before the form's end"));
  };

  #fail(error: Error): void {
    if (this.#failure !== undefined) return;
    this.#failure = error;
    this.#request.unpipe(this.#parser);
    this.#begun.reject(error);
    this.#finished.reject(error);
    this.#file?.destroy(error);
  }

  /** Only the client's silence counts: a guest that is slow to take bytes may be. */
  async #inTime<T>(wait: Promise<T>): Promise<T> {
    let timer: NodeJS.Timeout | undefined;
    const late = new Promise<never>((_resolve, reject) => {
      timer = setTimeout(() => {
        const error = stalled(this.#limits);
        this.#fail(error);
        reject(error);
      }, this.#limits.uploadStallMs);
    });
    try {
      return await Promise.race([wait, late]);
    } finally {
      clearTimeout(timer);
    }
  }
}

function openParser(request: IncomingMessage, limits: UploadLimits): BusboyInstance {
  try {
    return new Busboy({
      headers: { ...request.headers, "content-type": request.headers["content-type"] ?? "" },
      limits: { ...PART_LIMITS, fileSize: limits.fileBytes },
      isPartAFile: (name) => name !== "path",
      fileHwm: FILE_WINDOW_BYTES,
    });
  } catch (cause) {
    throw malformed("the form's Content-Type names no boundary", cause);
  }
}

function malformed(message: string, cause?: unknown): RookeryError {
  return new RookeryError("invalid_request", message, { cause });
}

function fieldName(name: string | undefined): string {
  return (name ?? "").slice(0, 128).toWellFormed();
}
