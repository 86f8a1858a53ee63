/**
 * A file of lines that only grows: an append is durable when it returns.
 *
 * Invariant: between appends the file ends with a newline. What a crash or a
 * full disk cut off is taken away again, since nobody was told that it is there.
 */
import { open, type FileHandle } from "node:fs/promises";

/** Far above any file of ours: a bound on what is read at start. */
const MAX_FILE_BYTES = 256 << 20;

export class LineFile {
  readonly #file: FileHandle;
  #sizeBytes: number;

  private constructor(file: FileHandle, sizeBytes: number) {
    this.#file = file;
    this.#sizeBytes = sizeBytes;
  }

  /** Opens or makes it; `lines` are those already in it. */
  static async open(path: string): Promise<{ file: LineFile; lines: string[] }> {
    const file = await open(path, "a+", 0o600);
    try {
      const { size } = await file.stat();
      if (size > MAX_FILE_BYTES) throw new Error(`${path}: ${size} bytes are more than it can have`);
      const bytes = Buffer.alloc(size);
      const { bytesRead } = await file.read(bytes, 0, size, 0);
      const wholeBytes = bytes.subarray(0, bytesRead).lastIndexOf(0x0a) + 1;
      if (wholeBytes < size) await file.truncate(wholeBytes);
      const lines = bytes.toString("utf8", 0, wholeBytes).split("\n").filter(Boolean);
      return { file: new LineFile(file, wholeBytes), lines };
    } catch (cause) {
      await file.close();
      throw cause;
    }
  }

  async append(line: string): Promise<void> {
    const bytes = Buffer.from(`${line}\n`);
    try {
      await this.#file.appendFile(bytes);
      await this.#file.datasync();
    } catch (cause) {
      await this.#file.truncate(this.#sizeBytes);
      throw cause;
    }
    this.#sizeBytes += bytes.length;
  }

  async close(): Promise<void> {
    await this.#file.close();
  }
}
