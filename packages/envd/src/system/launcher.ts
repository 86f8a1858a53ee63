/**
 * Starting programs without fork.
 *
 * Node can only fork: it copies the page tables of all of envd (10 ms under
 * emulation, more on some hosts), on the thread that answers requests, and it
 * cannot put the child into a cgroup or give it a user's groups. The kernel can
 * do all of it: clone3 makes a child that is born in the cgroup of user
 * processes and borrows envd's memory until it executes its program, as vfork
 * does. What the child has to do before is a list of system calls, written
 * here as data; the few instructions that no JavaScript can stand in for go
 * through that list until one fails or execve does not come back.
 *
 *   long launch(struct { clone_args *args; long size; step *next; long error; } *l)
 *   {
 *     long pid = clone3(l->args, l->size);
 *     if (pid != 0) return pid;                    // the parent, when the child let go
 *     for (step *s = l->next;;) {                  // step: { number, 4 arguments }
 *       long result = syscall(s->number, …); s++;
 *       if (result < 0) { l->next = s; l->error = result; exit(127); }
 *     }
 *   }
 *
 * It runs on a thread of libuv's pool: a child that gets no CPU (a fork bomb in
 * its cgroup) stops that thread, not envd. The child has its own descriptors,
 * folder, credentials and signal handlers; only memory is shared, and it writes
 * to nothing of it but the two fields above.
 */
import type Koffi from "koffi";
import type { LibraryHandle } from "koffi";

/** Made by `as` from the above; registers as the kernel's ABI has them. */
const MACHINE_CODE: Partial<Record<string, string>> = {
  x64:
    "5341544889fb" + // push rbx; push r12; mov rbx, rdi
    "488b3b488b7308b8b30100000f05" + // mov rdi, [rbx]; mov rsi, [rbx+8]; mov eax, 435; syscall
    "4885c07404415c5bc3" + // test rax, rax; jz child; pop r12; pop rbx; ret
    "4c8b6310" + // child: mov r12, [rbx+16]
    "498b0424498b7c2408498b742410" + // next: mov rax, [r12]; mov rdi, [r12+8]; mov rsi, [r12+16]
    "498b5424184d8b5424200f05" + // mov rdx, [r12+24]; mov r10, [r12+32]; syscall
    "4983c4284885c079dd" + // add r12, 40; test rax, rax; jns next
    "4c89631048894318" + // mov [rbx+16], r12; mov [rbx+24], rax
    "bf7f000000b83c0000000f05", // mov edi, 127; mov eax, 60; syscall
  arm64:
    "e90300aa200140f9210540f9683680d2010000d4" + // mov x9, x0; ldr x0, [x9]; ldr x1, [x9, 8]; mov x8, 435; svc
    "400000b4c0035fd6" + // cbz x0, child; ret
    "2a0940f9" + // child: ldr x10, [x9, 16]
    "480140f9408540a9428d41a9010000d4" + // next: ldr x8, [x10]; ldp x0, x1, [x10, 8]; ldp x2, x3, [x10, 24]; svc
    "4aa1009160ffffb6" + // add x10, x10, 40; tbz x0, 63, next
    "2a0900f9200d00f9" + // str x10, [x9, 16]; str x0, [x9, 24]
    "e00f80d2a80b80d2010000d4", // mov x0, 127; mov x8, 93; svc
};

/** arch/x86/entry/syscalls/syscall_64.tbl; include/uapi/asm-generic/unistd.h. */
const SYSCALLS = {
  x64: {
    setsid: 112,
    dup3: 292,
    close_range: 436,
    openat: 257,
    write: 1,
    close: 3,
    rt_sigaction: 13,
    rt_sigprocmask: 14,
    setgroups: 116,
    setresgid: 119,
    setresuid: 117,
    chdir: 80,
    execve: 59,
  },
  arm64: {
    setsid: 157,
    dup3: 24,
    close_range: 436,
    openat: 56,
    write: 64,
    close: 57,
    rt_sigaction: 134,
    rt_sigprocmask: 135,
    setgroups: 159,
    setresgid: 149,
    setresuid: 147,
    chdir: 49,
    execve: 221,
  },
};

type CallName = keyof (typeof SYSCALLS)["x64"];

/** linux/sched.h */
const CLONE_VM = 0x100n;
const CLONE_VFORK = 0x4000n;
const CLONE_CLEAR_SIGHAND = 0x1_0000_0000n;
const CLONE_INTO_CGROUP = 0x2_0000_0000n;
const SIGCHLD = 17n;
const SIGPIPE = 13;
const SIG_SETMASK = 2;
/** sizeof(sigset_t) of the kernel, and struct sigaction with all fields 0: the default action. */
const SIGSET_BYTES = 8;
const SIGACTION_BYTES = 32;
const AT_FDCWD = -100;
const O_WRONLY = 1;
/** The first descriptor that is free once all but the standard three are closed. */
const FIRST_FREE_FD = 3;
const MAX_FD = 2 ** 32 - 1;
const STEP_WORDS = 5;

const PAGE_BYTES = 4096;
const PROT_READ_WRITE = 3;
const PROT_READ_EXEC = 5;
const MAP_PRIVATE_ANONYMOUS = 0x22;

export interface LaunchSpec {
  /** Absolute, or relative to `cwd`. */
  path: string;
  argv: readonly string[];
  env: Readonly<Record<string, string>>;
  cwd: string;
  uid: number;
  gid: number;
  groups: readonly number[];
  /** Descriptors (of 3 and above) that become 0, 1 and 2. */
  stdio: readonly [number, number, number];
  /** A folder of cgroup v2 to be born in. */
  cgroupFd: number | undefined;
  /** Written to oom_score_adj; undefined leaves it as envd's. */
  oomScore: string | undefined;
}

export interface Launched {
  /** 0 when there is none. The caller waits for it even when it failed. */
  pid: number;
  /** Why the program does not run. */
  failure: { call: CallName | "clone3"; errno: number } | undefined;
}

export type Launch = (spec: LaunchSpec) => Promise<Launched>;

export function makeLaunch(koffi: typeof Koffi, libc: LibraryHandle): Launch {
  const code = MACHINE_CODE[process.arch];
  if (code === undefined || !Object.hasOwn(SYSCALLS, process.arch)) {
    throw new Error(`envd runs on x64 and arm64, not on ${process.arch}`);
  }
  const numbers = process.arch === "arm64" ? SYSCALLS.arm64 : SYSCALLS.x64;
  const mmap = libc.func("void *mmap(void *, size_t, int, int, int, long)");
  const mprotect = libc.func("int mprotect(void *, size_t, int)");
  const page = mmap(null, PAGE_BYTES, PROT_READ_WRITE, MAP_PRIVATE_ANONYMOUS, -1, 0);
  Buffer.from(koffi.view(page, PAGE_BYTES)).set(Buffer.from(code, "hex"));
  if (mprotect(page, PAGE_BYTES, PROT_READ_EXEC) !== 0) throw new Error("mprotect failed");
  const run = koffi.decode(page, koffi.proto("long Launch(void *)"));

  return async (spec) => {
    // What the kernel reads by address must outlive the call; nothing else refers to it.
    const alive: object[] = [];
    const addressOf = (memory: Buffer | BigUint64Array | Uint32Array): bigint => {
      alive.push(memory);
      return koffi.address(memory);
    };
    const text = (value: string) => addressOf(Buffer.from(`${value}\0`));
    const texts = (values: readonly string[]) => addressOf(pointersTo(values, addressOf));

    const calls: [CallName, ...(number | bigint)[]][] = [
      ["setsid"],
      ...spec.stdio.map((fd, index): [CallName, number, number, number] => ["dup3", fd, index, 0]),
      ["close_range", FIRST_FREE_FD, MAX_FD, 0],
      // Node ignores SIGPIPE, and that alone outlives an exec.
      ["rt_sigaction", SIGPIPE, addressOf(Buffer.alloc(SIGACTION_BYTES)), 0, SIGSET_BYTES],
      ["rt_sigprocmask", SIG_SETMASK, addressOf(Buffer.alloc(SIGSET_BYTES)), 0, SIGSET_BYTES],
    ];
    if (spec.oomScore !== undefined) {
      calls.push(
        ["openat", AT_FDCWD, text("/proc/self/oom_score_adj"), O_WRONLY],
        ["write", FIRST_FREE_FD, text(spec.oomScore), spec.oomScore.length],
        ["close", FIRST_FREE_FD],
      );
    }
    calls.push(
      ["setgroups", spec.groups.length, addressOf(new Uint32Array([...spec.groups, 0]))],
      ["setresgid", spec.gid, spec.gid, spec.gid],
      ["setresuid", spec.uid, spec.uid, spec.uid],
      ["chdir", text(spec.cwd)],
      [
        "execve",
        text(spec.path),
        texts(spec.argv),
        texts(Object.entries(spec.env).map(([name, value]) => `${name}=${value}`)),
      ],
    );
    const steps = new BigUint64Array(calls.length * STEP_WORDS);
    for (const [index, [name, ...values]] of calls.entries()) {
      const words = [numbers[name], ...values].map((value) => BigInt.asUintN(64, BigInt(value)));
      steps.set(words, index * STEP_WORDS);
    }
    // struct clone_args: flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size, cgroup
    const cloneArgs = new BigUint64Array(11);
    cloneArgs[0] = CLONE_VM | CLONE_VFORK | CLONE_CLEAR_SIGHAND;
    cloneArgs[4] = SIGCHLD;
    if (spec.cgroupFd !== undefined) {
      cloneArgs[0] |= CLONE_INTO_CGROUP;
      cloneArgs[10] = BigInt(spec.cgroupFd);
    }
    const firstStep = addressOf(steps);
    const launch = new BigUint64Array([addressOf(cloneArgs), BigInt(cloneArgs.byteLength), firstStep, 0n]);

    const result = Number(
      await new Promise<number | bigint>((resolve, reject) => {
        run.async(launch, (error: Error | null, value: number | bigint) => {
          if (error) reject(error);
          else resolve(value);
        });
      }),
    );
    // Keeps `alive` reachable until here.
    if (alive.length === 0) throw new Error("unreachable");
    if (result < 0) return { pid: 0, failure: { call: "clone3", errno: -result } };
    const error = Number(BigInt.asIntN(64, launch[3]!));
    if (error === 0) return { pid: result, failure: undefined };
    const done = Number(launch[2]! - firstStep) / (8 * STEP_WORDS);
    return { pid: result, failure: { call: calls[done - 1]![0], errno: -error } };
  };
}

/** A NULL-terminated array of C strings, which lie in one piece of memory. */
function pointersTo(values: readonly string[], addressOf: (memory: Buffer) => bigint): BigUint64Array {
  const memory = Buffer.from(values.map((value) => `${value}\0`).join(""));
  const pointers = new BigUint64Array(values.length + 1);
  let address = addressOf(memory);
  for (const [index, value] of values.entries()) {
    pointers[index] = address;
    address += BigInt(Buffer.byteLength(value) + 1);
  }
  return pointers;
}
