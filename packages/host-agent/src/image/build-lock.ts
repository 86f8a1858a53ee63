/**
 * At most one process builds images in a data directory.
 *
 * flock(1) holds the lock for as long as its stdin is open, so the kernel lets
 * go of it when we die, however we die.
 */
import { spawn } from "node:child_process";
import { once } from "node:events";
import { SYSTEM_PATH } from "./definitions.ts";

/** Waits for the lock; `onWait` is called when another process has it. */
export async function acquireBuildLock(
  path: string,
  options: { signal: AbortSignal; onWait: () => void },
): Promise<AsyncDisposable> {
  const { signal, onWait } = options;
  return (await tryLock(path, "--nonblock", signal)) ?? (await waitForLock(path, signal, onWait));
}

async function waitForLock(path: string, signal: AbortSignal, onWait: () => void): Promise<AsyncDisposable> {
  onWait();
  const lock = await tryLock(path, "--exclusive", signal);
  if (lock === undefined) throw new Error(`flock gave up on ${path}`);
  return lock;
}

async function tryLock(
  path: string,
  mode: "--nonblock" | "--exclusive",
  signal: AbortSignal,
): Promise<AsyncDisposable | undefined> {
  signal.throwIfAborted();
  const holder = spawn("flock", [mode, "--conflict-exit-code", "75", path, "sh", "-c", "echo; exec cat"], {
    stdio: ["pipe", "pipe", "inherit"],
    env: { PATH: SYSTEM_PATH },
    detached: true, // a Ctrl-C is ours to handle: the lock outlives it until the build is undone
  });
  const ended = once(holder, "close").then(([code]: unknown[]) => code);
  try {
    const first = await Promise.race([
      once(holder.stdout, "data", { signal }).then(() => "locked" as const),
      ended,
    ]);
    if (first === "locked") {
      return {
        async [Symbol.asyncDispose]() {
          holder.stdin.end();
          await ended;
        },
      };
    }
    if (first === 75) return undefined;
    throw new Error(`flock ${path}: ended with ${String(first)}`);
  } catch (cause) {
    holder.kill("SIGKILL");
    holder.stdin.destroy(); // should it have got the lock just now: ends what holds it
    signal.throwIfAborted();
    throw cause;
  }
}
