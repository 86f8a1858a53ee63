/**
 * System calls that Node has no name for, through koffi's native module.
 *
 * The bundle cannot carry a `.node` file, so it lies beside it and is loaded by
 * its path. `asUser` is the odd one: libuv drops all supplementary groups when
 * it sets a child's gid. So the calling thread takes the user's gid and groups
 * itself, gives up CAP_SETGID (which makes libuv's setgroups fail, an error
 * that it ignores), forks, and takes all back. Its uid stays 0 throughout:
 * users' processes never get the right to signal envd. Raw system calls are
 * used because glibc's wrappers change every thread of the process.
 */
import { createRequire } from "node:module";
import { arch } from "node:process";
import { getSystemErrorName } from "node:util";
import type Koffi from "koffi";

/** linux/include/uapi/asm-generic/unistd.h (arm64) and arch/x86/entry/syscalls/syscall_64.tbl. */
const SYSCALLS: Partial<Record<string, Record<"setgroups" | "setresgid" | "capget" | "capset", number>>> = {
  x64: { setgroups: 116, setresgid: 119, capget: 125, capset: 126 },
  arm64: { setgroups: 159, setresgid: 149, capget: 90, capset: 91 },
};

/** linux/capability.h */
const CAPABILITY_VERSION_3 = 0x2008_0522;
const CAP_SETGID = 6;
/** linux/random.h: _IOW('R', 3, int[2]) and _IO('R', 7). */
const RNDADDENTROPY = 0x4008_5203;
const RNDRESEEDCRNG = 0x5207;
/** asm-generic/ioctls.h */
const FIONREAD = 0x541b;
/** linux/fs.h, ext4.h: _IOW('f', 16, __u64). */
const EXT4_IOC_RESIZE_FS = 0x4008_6610;
const CLOCK_REALTIME = 0;
const O_CLOEXEC = 0o2000000;
const MS_REMOUNT = 32;
/** xattr.h: what a name or a list may hold at most. */
const XATTR_LIST_MAX = 65_536;
const XATTR_SIZE_MAX = 65_536;

export interface Credentials {
  uid: number;
  gid: number;
  groups: readonly number[];
}

export type Native = ReturnType<typeof openNative>;

export function openNative(koffiPath: string) {
  const numbers = SYSCALLS[arch];
  if (numbers === undefined) throw new Error(`envd runs on x64 and arm64, not on ${arch}`);
  const koffi: typeof Koffi = createRequire(import.meta.url)(koffiPath);
  const libc = koffi.load(null);

  const syscall3 = libc.func("long syscall(long, long, long, long)");
  const syscallGroups = libc.func("long syscall(long, long, void *)");
  const syscallCaps = libc.func("long syscall(long, void *, void *)");
  const ioctlPlain = libc.func("int ioctl(int, unsigned long, long)");
  const ioctlPointer = libc.func("int ioctl(int, unsigned long, void *)");
  const clockSettime = libc.func("int clock_settime(int, void *)");
  const pipe2 = libc.func("int pipe2(void *, int)");
  const mount = libc.func("int mount(const char *, const char *, const char *, unsigned long, const char *)");
  const fsetxattr = libc.func("int fsetxattr(int, const char *, void *, size_t, int)");
  const llistxattr = libc.func("long llistxattr(const char *, void *, size_t)");
  const lgetxattr = libc.func("long lgetxattr(const char *, const char *, void *, size_t)");

  const check = (result: number, call: string): number => {
    if (result >= 0) return result;
    throw systemError(koffi.errno(), call);
  };

  const capabilityHeader = new Uint32Array([CAPABILITY_VERSION_3, 0]);
  const allCapabilities = new Uint32Array(6);
  check(syscallCaps(numbers.capget, capabilityHeader, allCapabilities), "capget");
  const withoutSetgid = allCapabilities.slice();
  withoutSetgid[0]! &= ~(1 << CAP_SETGID);
  const ownGroups = new Uint32Array(process.getgroups!());
  const ownGid = process.getegid!();

  const takeBack = (): void => {
    const failed =
      syscallCaps(numbers.capset, capabilityHeader, allCapabilities) < 0 ||
      syscall3(numbers.setresgid, ownGid, ownGid, ownGid) < 0 ||
      syscallGroups(numbers.setgroups, ownGroups.length, ownGroups) < 0;
    // envd with half of a user's rights must not go on.
    if (failed) process.abort();
  };

  return {
    /** Runs `fork` so that a child born in it has these groups; `fork` itself sets the uid. */
    asUser<T>({ gid, groups }: Credentials, fork: () => T): T {
      const list = new Uint32Array(groups);
      try {
        check(syscallGroups(numbers.setgroups, list.length, list), "setgroups");
        check(syscall3(numbers.setresgid, gid, gid, gid), "setresgid");
        check(syscallCaps(numbers.capset, capabilityHeader, withoutSetgid), "capset");
        return fork();
      } finally {
        takeBack();
      }
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

    remount(target: string, options: string): void {
      check(mount("none", target, null, MS_REMOUNT, options), `mount ${target}`);
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
