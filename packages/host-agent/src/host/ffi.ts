/**
 * Calls into libc for which Node has no API. The only module that knows koffi.
 *
 * Invariants: a failed call throws an Error with `code` and `errno`, as Node's
 * own do; every address stays inside of this module or travels as a bigint.
 * Memory whose address goes to the kernel is off the V8 heap (Buffers made by
 * `allocUnsafeSlow`), for small typed arrays move when garbage is collected.
 */
import koffi from "koffi";
import { constants as osConstants } from "node:os";

const libc = koffi.load(null);

const fn = {
  memfdCreate: libc.func("int memfd_create(const char *name, unsigned int flags)"),
  fcntl: libc.func("int fcntl(int fd, int cmd, int arg)"),
  mmap: libc.func("void *mmap(void *addr, size_t len, int prot, int flags, int fd, int64_t off)"),
  munmap: libc.func("int munmap(void *addr, size_t len)"),
  madvise: libc.func("int madvise(void *addr, size_t len, int advice)"),
  mprotect: libc.func("int mprotect(void *addr, size_t len, int prot)"),
  socket: libc.func("int socket(int domain, int type, int protocol)"),
  bind: libc.func("int bind(int fd, void *address, unsigned int length)"),
  listen: libc.func("int listen(int fd, int backlog)"),
  close: libc.func("int close(int fd)"),
  lseek: libc.func("int64_t lseek(int fd, int64_t offset, int whence)"),
  clockGettime: libc.func("int clock_gettime(int clock, void *time)"),
  // `unsigned long` counts and `ssize_t` results: 64 bits on all our platforms.
  processVmReadv: libc.func(
    "int64_t process_vm_readv(int pid, void *local, unsigned long localCount, void *remote, unsigned long remoteCount, unsigned long flags)",
  ),
  processVmWritev: libc.func(
    "int64_t process_vm_writev(int pid, void *local, unsigned long localCount, void *remote, unsigned long remoteCount, unsigned long flags)",
  ),
};

const ERRNO_NAMES = new Map(Object.entries(osConstants.errno).map(([name, number]) => [number, name]));

function systemError(call: string, errno: number): NodeJS.ErrnoException {
  const code = ERRNO_NAMES.get(errno) ?? `errno ${errno}`;
  return Object.assign(new Error(`${call}: ${code}`), { code, errno: -errno, syscall: call });
}

function checked(call: string, result: number): number {
  if (result < 0) throw systemError(call, koffi.errno());
  return result;
}

const MFD_CLOEXEC = 1;
const MFD_ALLOW_SEALING = 2;

/** An anonymous file in memory. Its descriptor is closed on exec; a child inherits it only through `stdio`. */
export function memfdCreate(name: string): number {
  return checked("memfd_create", Number(fn.memfdCreate(name, MFD_CLOEXEC | MFD_ALLOW_SEALING)));
}

const F_ADD_SEALS = 1033;
const F_SEAL_SEAL = 1;
const F_SEAL_SHRINK = 2;
const F_SEAL_GROW = 4;
const F_SEAL_WRITE = 8;

/** From now on nobody can change the file, whoever holds a descriptor; private mappings still work. */
export function sealAgainstChange(fd: number): void {
  checked(
    "fcntl",
    Number(fn.fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)),
  );
}

const F_GET_SEALS = 1034;

export function isSealedAgainstChange(fd: number): boolean {
  const wanted = F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW;
  return (checked("fcntl", Number(fn.fcntl(fd, F_GET_SEALS, 0))) & wanted) === wanted;
}

const SEEK_DATA = 3;
const SEEK_HOLE = 4;

/** The next run of bytes at or after `from` that is not a hole; undefined: only holes are left. Moves the file's offset. */
export function nextDataExtent(fd: number, from: number): { start: number; end: number } | undefined {
  const start = Number(fn.lseek(fd, from, SEEK_DATA));
  if (start < 0) {
    const error = systemError("lseek", koffi.errno());
    if (error.code === "ENXIO") return undefined;
    throw error;
  }
  return { start, end: checked("lseek", Number(fn.lseek(fd, start, SEEK_HOLE))) };
}

const PROT_READ = 1;
const PROT_WRITE = 2;
const PROT_EXEC = 4;
const MAP_SHARED = 1;
const MAP_PRIVATE = 2;
const MAP_ANONYMOUS = 0x20;
const MAP_FAILED = 0xffff_ffff_ffff_ffffn;

/** A mapping and its bytes. After `unmap` the bytes must not be touched. */
export interface Mapping {
  readonly bytes: Buffer;
  readonly address: bigint;
  unmap(): void;
}

function mapMemory(bytes: number, protection: number, flags: number, fd: number): Mapping {
  const pointer = koffi.address(fn.mmap(null, bytes, protection, flags, fd, 0));
  if (pointer === MAP_FAILED || pointer === -1n) throw systemError("mmap", koffi.errno());
  return {
    bytes: Buffer.from(koffi.view(pointer, bytes)),
    address: pointer,
    unmap: () => void checked("munmap", Number(fn.munmap(pointer, bytes))),
  };
}

/** The file's bytes, read-only. Private, because a shared mapping of a sealed memfd is refused before Linux 6.7. */
export function mapFileForReading(fd: number, bytes: number): Mapping {
  return mapMemory(bytes, PROT_READ, MAP_PRIVATE, fd);
}

/** The file's bytes, to be written. */
export function mapFileForWriting(fd: number, bytes: number): Mapping {
  return mapMemory(bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
}

/** Page-aligned memory of its own, given back by `unmap` and not whenever garbage is collected. */
export function mapAnonymous(bytes: number): Mapping {
  return mapMemory(bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
}

const HUGE_PAGE_BYTES = 2 << 20;
const MADV_HUGEPAGE = 14;

/**
 * Memory for large copies. Of huge pages where the kernel grants them: touching
 * 16 MiB for the first time page by page takes longer than copying it (under
 * some hypervisors 100 ms against 5).
 */
export function mapLargeBuffer(bytes: number): Mapping {
  const size = Math.max(1, Math.ceil(bytes / HUGE_PAGE_BYTES)) * HUGE_PAGE_BYTES;
  // One more, so that a huge page begins in it.
  const mapping = mapAnonymous(size + HUGE_PAGE_BYTES);
  const skipped = Number(-mapping.address & BigInt(HUGE_PAGE_BYTES - 1));
  const address = mapping.address + BigInt(skipped);
  // Refused where the kernel has no huge pages: it is ordinary memory then.
  fn.madvise(address, size, MADV_HUGEPAGE);
  return { bytes: mapping.bytes.subarray(skipped, skipped + bytes), address, unmap: () => mapping.unmap() };
}

/** A function of machine code without arguments that returns a uint64. */
export function machineCodeFunction(code: Uint8Array): () => bigint {
  const mapping = mapAnonymous(4096);
  mapping.bytes.set(code);
  checked("mprotect", Number(fn.mprotect(mapping.address, 4096, PROT_READ | PROT_EXEC)));
  const prototype = koffi.proto("uint64_t ()");
  return () => BigInt(koffi.call(mapping.address, prototype));
}

const CLOCK_MONOTONIC_RAW = 4;
const timespec = Buffer.allocUnsafeSlow(64);

/** Nanoseconds of the hardware clock that no time daemon slews. */
export function monotonicRawNs(): bigint {
  checked("clock_gettime", Number(fn.clockGettime(CLOCK_MONOTONIC_RAW, timespec)));
  return timespec.readBigInt64LE(0) * 1_000_000_000n + timespec.readBigInt64LE(8);
}

/** Where the kernel finds a buffer. The caller keeps the buffer alive for as long as the address is in use. */
export function addressOf(buffer: Buffer): bigint {
  return koffi.address(buffer);
}

/** One piece of a process's memory. */
export interface RemoteRange {
  address: number;
  bytes: number;
}

/** IOV_MAX: a call takes at most so many pieces. */
const MAX_RANGES_PER_CALL = 1024;
/** Bounds the time of one call; aborting acts between calls. */
const MAX_BYTES_PER_CALL = 32 * 1024 * 1024;

type Transfer = typeof fn.processVmReadv;

async function transfer(
  call: Transfer,
  name: string,
  pid: number,
  local: Buffer,
  ranges: readonly RemoteRange[],
  signal: AbortSignal,
): Promise<void> {
  const iovecs = Buffer.allocUnsafeSlow(16 * (MAX_RANGES_PER_CALL + 1));
  const base = addressOf(local);
  let next = 0;
  let offset = 0;
  while (next < ranges.length) {
    signal.throwIfAborted();
    let count = 0;
    let bytes = 0;
    for (; count < MAX_RANGES_PER_CALL && next + count < ranges.length; count += 1) {
      const range = ranges[next + count];
      if (range === undefined || (count > 0 && bytes + range.bytes > MAX_BYTES_PER_CALL)) break;
      iovecs.writeBigUInt64LE(BigInt(range.address), 16 * (count + 1));
      iovecs.writeBigUInt64LE(BigInt(range.bytes), 16 * (count + 1) + 8);
      bytes += range.bytes;
    }
    if (offset + bytes > local.length) throw new RangeError(`${name}: ranges exceed the buffer`);
    iovecs.writeBigUInt64LE(base + BigInt(offset), 0);
    iovecs.writeBigUInt64LE(BigInt(bytes), 8);
    const moved = await new Promise<number>((resolve, reject) => {
      call.async(
        pid,
        iovecs,
        1,
        iovecs.subarray(16),
        count,
        0,
        (error: Error | null, result: number | bigint) => {
          if (error) reject(error);
          else if (Number(result) < 0) reject(systemError(name, koffi.errno()));
          else resolve(Number(result));
        },
      );
    });
    // A short transfer means a hole in the process's mapping: not the memory that we were told of.
    if (moved !== bytes) throw new Error(`${name}: ${moved} of ${bytes} bytes`);
    next += count;
    offset += bytes;
  }
}

/** Copies the ranges, one after the other, into `into`. Runs in the thread pool. */
export function readProcessMemory(
  pid: number,
  ranges: readonly RemoteRange[],
  into: Buffer,
  signal: AbortSignal,
): Promise<void> {
  return transfer(fn.processVmReadv, "process_vm_readv", pid, into, ranges, signal);
}

/** Fills the ranges, one after the other, from `from`. Runs in the thread pool. */
export function writeProcessMemory(
  pid: number,
  ranges: readonly RemoteRange[],
  from: Buffer,
  signal: AbortSignal,
): Promise<void> {
  return transfer(fn.processVmWritev, "process_vm_writev", pid, from, ranges, signal);
}

const AF_UNIX = 1;
const SOCK_STREAM = 1;
const SOCK_CLOEXEC = 0o2000000;
/** sizeof(sockaddr_un.sun_path), with its NUL. */
const SUN_PATH_BYTES = 108;

/**
 * A listening Unix socket as a bare descriptor, for a child to inherit: the
 * child then serves a path in a directory that it cannot write. The caller closes it.
 */
export function listenUnix(path: string): number {
  const encoded = Buffer.from(path);
  if (encoded.length >= SUN_PATH_BYTES) throw new RangeError(`socket path is too long: ${path}`);
  const address = Buffer.allocUnsafeSlow(2 + SUN_PATH_BYTES).fill(0);
  address.writeUInt16LE(AF_UNIX, 0);
  encoded.copy(address, 2);
  const fd = checked("socket", Number(fn.socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)));
  try {
    checked("bind", Number(fn.bind(fd, address, address.length)));
    checked("listen", Number(fn.listen(fd, 1)));
    return fd;
  } catch (error) {
    fn.close(fd);
    throw error;
  }
}

const flock = libc.func("int flock(int fd, int operation)");
const LOCK_EX = 2;
const LOCK_NB = 4;

/** Locks the open file for this process, until it is closed or the process dies. False: another one has it. */
export function tryLockFile(fd: number): boolean {
  if (Number(flock(fd, LOCK_EX | LOCK_NB)) === 0) return true;
  const failure = systemError("flock", koffi.errno());
  if (failure.code === "EWOULDBLOCK" || failure.code === "EAGAIN") return false;
  throw failure;
}
