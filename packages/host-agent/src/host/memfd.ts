/**
 * Files that live in memory and have no name: a VMM gets them as inherited
 * descriptors, so that nothing of them lies in a directory that it can write.
 *
 * A descriptor here belongs to its `Memfd`; whoever opens one closes it.
 */
import { constants, promises as fs, closeSync, fstatSync, openSync, readSync, writeSync } from "node:fs";
import { isErrno } from "./errno.ts";
import { memfdCreate, sealAgainstChange } from "./ffi.ts";

export class Memfd implements Disposable {
  readonly fd: number;
  /** With the device, names the file for as long as anybody holds it. */
  readonly identity: { dev: string; ino: string };
  #closed = false;

  private constructor(fd: number) {
    this.fd = fd;
    const stat = fstatSync(fd, { bigint: true });
    this.identity = { dev: stat.dev.toString(), ino: stat.ino.toString() };
  }

  static create(name: string): Memfd {
    return new Memfd(memfdCreate(name));
  }

  /** The same file through a descriptor of a live process; undefined when it holds none of that identity. */
  static async openFromProcess(
    pid: number,
    identity: { dev: string; ino: string },
  ): Promise<Memfd | undefined> {
    const directory = `/proc/${pid}/fd`;
    let names: string[];
    try {
      names = await fs.readdir(directory);
    } catch (error) {
      if (isErrno(error, "ENOENT", "ESRCH")) return undefined;
      throw error;
    }
    for (const name of names) {
      const path = `${directory}/${name}`;
      const target = await fs.readlink(path).catch(() => "");
      // Opening anything else (a socket, a device) could block or have effects.
      if (!target.startsWith("/memfd:")) continue;
      let fd: number;
      try {
        fd = openSync(path, constants.O_RDWR);
      } catch (error) {
        if (isErrno(error, "ENOENT")) continue;
        throw error;
      }
      const found = new Memfd(fd);
      if (found.identity.dev === identity.dev && found.identity.ino === identity.ino) return found;
      found[Symbol.dispose]();
    }
    return undefined;
  }

  sizeBytes(): number {
    return fstatSync(this.fd).size;
  }

  /** The whole content; throws when it is larger than `maxBytes`. */
  read(maxBytes: number): Buffer {
    const size = this.sizeBytes();
    if (size > maxBytes) throw new RangeError(`${size} bytes where at most ${maxBytes} were expected`);
    const content = Buffer.allocUnsafeSlow(size);
    this.readInto(content, size, 0);
    return content;
  }

  /** Reads `bytes` from `position` to the beginning of `into`; throws when there are fewer. */
  readInto(into: Buffer, bytes: number, position: number): void {
    let done = 0;
    while (done < bytes) {
      const count = readSync(this.fd, into, done, bytes - done, position + done);
      if (count === 0) throw new RangeError("a memfd ended early");
      done += count;
    }
  }

  /** Writes at a position; the file's own offset, which a child may share, stays. */
  write(content: Uint8Array, position: number): void {
    let done = 0;
    while (done < content.length) {
      done += writeSync(this.fd, content, done, content.length - done, position + done);
    }
  }

  seal(): void {
    sealAgainstChange(this.fd);
  }

  [Symbol.dispose](): void {
    if (this.#closed) return;
    this.#closed = true;
    closeSync(this.fd);
  }
}
