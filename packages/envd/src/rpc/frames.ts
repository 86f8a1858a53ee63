/**
 * Frames of the Connect protocol's streams: a flags byte, the length as 32 bits
 * big-endian, that many bytes.
 */
import { Code, ConnectError } from "@connectrpc/connect";

const HEAD_BYTES = 5;
const FLAG_COMPRESSED = 1;
export const FLAG_END = 2;

export function frameOf(flags: number, message: Uint8Array): Buffer {
  const frame = Buffer.allocUnsafe(HEAD_BYTES + message.byteLength);
  frame.writeUInt8(flags, 0);
  frame.writeUInt32BE(message.byteLength, 1);
  frame.set(message, HEAD_BYTES);
  return frame;
}

/** Cuts what a client sends into messages. Holds at most one message and one chunk. */
export class FrameReader {
  readonly #maxBytes: number;
  #parts: Buffer[] = [];
  #buffered = 0;
  /** Of the frame that is being gathered, its head included; until the head is there, the head's. */
  #wanted = HEAD_BYTES;

  constructor(maxBytes: number) {
    this.#maxBytes = maxBytes;
  }

  /** The messages that `chunk` completes. */
  *push(chunk: Buffer): Generator<Buffer> {
    this.#parts.push(chunk);
    this.#buffered += chunk.byteLength;
    while (this.#buffered >= this.#wanted) {
      const bytes = this.#parts.length === 1 ? this.#parts[0]! : Buffer.concat(this.#parts);
      this.#parts = [bytes];
      if (this.#wanted === HEAD_BYTES && this.#readHead(bytes) > 0) continue;
      this.#parts = [bytes.subarray(this.#wanted)];
      this.#buffered = bytes.byteLength - this.#wanted;
      const message = bytes.subarray(HEAD_BYTES, this.#wanted);
      this.#wanted = HEAD_BYTES;
      yield message;
    }
  }

  /** Throws when the stream broke off within a frame. */
  finish(): void {
    if (this.#buffered > 0) throw invalid("the request ends within a message");
  }

  #readHead(bytes: Buffer): number {
    const flags = bytes.readUInt8(0);
    const length = bytes.readUInt32BE(1);
    if ((flags & FLAG_COMPRESSED) !== 0) {
      throw new ConnectError("compressed messages are not supported", Code.Unimplemented);
    }
    if (flags !== 0) throw invalid(`a message has unknown flags ${flags}`);
    if (length > this.#maxBytes) {
      throw new ConnectError(
        `a message of ${length} bytes exceeds ${this.#maxBytes}`,
        Code.ResourceExhausted,
      );
    }
    this.#wanted = HEAD_BYTES + length;
    return length;
  }
}

function invalid(message: string): ConnectError {
  return new ConnectError(message, Code.InvalidArgument);
}
