/**
 * System calls that Node has no name for, through koffi's native module. The
 * bundle cannot carry a `.node` file, so it lies beside it and is loaded by its
 * path.
 */
import { createRequire } from "node:module";
import { getSystemErrorName } from "node:util";
import type Koffi from "koffi";
import { makeLaunch } from "./launcher.ts";

/** linux/random.h: _IOW('R', 3, int[2]) and _IO('R', 7). */
const RNDADDENTROPY = 0x4008_5203;
const RNDRESEEDCRNG = 0x5207;
/** asm-generic/ioctls.h */
const FIONREAD = 0x541b;
/** linux/fs.h, ext4.h: _IOW('f', 16, __u64). */
const EXT4_IOC_RESIZE_FS = 0x4008_6610;
const CLOCK_REALTIME = 0;
const O_CLOEXEC = 0o2000000;
const WNOHANG = 1;
/** xattr.h: what a name or a list may hold at most. */
const XATTR_LIST_MAX = 65_536;
const XATTR_SIZE_MAX = 65_536;

export type Native = ReturnType<typeof openNative>;

export function openNative(koffiPath: string) {
  const koffi: typeof Koffi = createRequire(import.meta.url)(koffiPath);
  const libc = koffi.load(null);

  const ioctlPlain = libc.func("int ioctl(int, unsigned long, long)");
  const ioctlPointer = libc.func("int ioctl(int, unsigned long, void *)");
  const clockSettime = libc.func("int clock_settime(int, void *)");
  const waitpid = libc.func("int waitpid(int, void *, int)");
  const pipe2 = libc.func("int pipe2(void *, int)");
  const fsetxattr = libc.func("int fsetxattr(int, const char *, void *, size_t, int)");
  const llistxattr = libc.func("long llistxattr(const char *, void *, size_t)");
  const lgetxattr = libc.func("long lgetxattr(const char *, const char *, void *, size_t)");

  const check = (result: number, call: string): number => {
    if (result >= 0) return result;
    throw systemError(koffi.errno(), call);
  };

  return {
    launch: makeLaunch(koffi, libc),

    /** How a child ended (wait(2)), or undefined while it runs. It must be a child. */
    waitStatus(pid: number): number | undefined {
      const status = new Int32Array(1);
      return check(waitpid(pid, status, WNOHANG), "waitpid") === 0 ? undefined : status[0]!;
    },

    /** A pipe that no child inherits by accident. */
    pipe(): { readFd: number; writeFd: number } {
      const fds = new Int32Array(2);
      check(pipe2(fds, O_CLOEXEC), "pipe2");
      return { readFd: fds[0]!, writeFd: fds[1]! };
    },

    /** Bytes that a pipe holds now. */
    unreadBytes(fd: number): number {
      const count = new Int32Array(1);
      check(ioctlPointer(fd, FIONREAD, count), "ioctl FIONREAD");
      return count[0]!;
    },

    setClock({ seconds, nanoseconds }: { seconds: bigint; nanoseconds: bigint }): void {
      check(clockSettime(CLOCK_REALTIME, new BigInt64Array([seconds, nanoseconds])), "clock_settime");
    },

    /** Credits `entropy` to the kernel's pool through /dev/urandom and makes its generator use it at once. */
    addEntropy(urandomFd: number, entropy: Uint8Array): void {
      // struct rand_pool_info { int entropy_count (bits); int buf_size (bytes); __u32 buf[]; }
      const info = Buffer.alloc(8 + entropy.byteLength);
      new Int32Array(info.buffer, info.byteOffset, 2).set([8 * entropy.byteLength, entropy.byteLength]);
      info.set(entropy, 8);
      check(ioctlPointer(urandomFd, RNDADDENTROPY, info), "ioctl RNDADDENTROPY");
      check(ioctlPlain(urandomFd, RNDRESEEDCRNG, 0), "ioctl RNDRESEEDCRNG");
    },

    /** Grows a mounted ext4 to `blocks` of its own size; `fd` is any file or folder in it. */
    growExt4(fd: number, blocks: bigint): void {
      check(ioctlPointer(fd, EXT4_IOC_RESIZE_FS, new BigUint64Array([blocks])), "ioctl EXT4_IOC_RESIZE_FS");
    },

    setXattr(fd: number, name: string, value: Uint8Array): void {
      check(fsetxattr(fd, name, value, value.byteLength, 0), `fsetxattr ${name}`);
    },

    /** Names of extended attributes; none where the file system has none. Links are not followed. */
    listXattrs(path: string): string[] {
      if (Number(llistxattr(path, null, 0)) <= 0) return [];
      const buffer = Buffer.alloc(XATTR_LIST_MAX);
      const length = Number(llistxattr(path, buffer, buffer.byteLength));
      return length <= 0 ? [] : buffer.toString("utf8", 0, length - 1).split("\0");
    },

    getXattr(path: string, name: string): Buffer | undefined {
      const length = Number(lgetxattr(path, name, null, 0));
      if (length < 0) return undefined;
      const buffer = Buffer.alloc(Math.min(length, XATTR_SIZE_MAX));
      const read = Number(lgetxattr(path, name, buffer, buffer.byteLength));
      return read < 0 ? undefined : buffer.subarray(0, read);
    },
  };
}

function systemError(errno: number, call: string): NodeJS.ErrnoException {
  const code = getSystemErrorName(-errno);
  return Object.assign(new Error(`${code}: ${call}`), { code, errno: -errno, syscall: call });
}
