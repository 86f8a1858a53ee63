import { strict as assert } from "node:assert";
import { existsSync, readFileSync } from "node:fs";
import { mkdtemp } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect, test } from "vitest";
import { removeTree } from "./atomic-file.ts";
import { CommandError, run } from "./run.ts";

const isAlive = (pid: number): boolean =>
  existsSync(`/proc/${pid}`) && !/^State:\s+Z/m.test(readFileSync(`/proc/${pid}/status`, "utf8"));

test("gives back both outputs and the exit code, and writes the input", async () => {
  assert.deepEqual(await run(["sh", "-c", "cat; echo oops >&2; exit 3"], { input: "hi", okExitCodes: [3] }), {
    stdout: "hi",
    stderr: "oops\n",
    exitCode: 3,
  });
});

test("an exit code that was not expected names the program, the code and the end of stderr", async () => {
  const error = await run(["sh", "-c", "echo why >&2; exit 4"]).then(
    () => assert.fail("it did not fail"),
    (error: unknown) => error,
  );
  assert(error instanceof CommandError);
  assert.equal(error.message, "sh: exit code 4: why");
  assert.equal(error.exitCode, 4);
});

test("a program that is not there is an error that says so", async () => {
  await assert.rejects(run(["rookery-no-such-program"]), /rookery-no-such-program: could not be started/);
});

test("a program past its time is killed with its children", async () => {
  const dir = await mkdtemp(join(tmpdir(), "rookery-run-"));
  try {
    const pidFile = join(dir, "pid");
    await assert.rejects(
      run(["sh", "-c", `sleep 600 & echo $! > ${pidFile}; wait`], { timeoutMs: 300 }),
      /sh: did not end within 300 ms/,
    );
    const pid = Number(readFileSync(pidFile, "utf8"));
    await expect.poll(() => isAlive(pid)).toBe(false);
  } finally {
    await removeTree(dir);
  }
});

test("an abort ends the program and is thrown as its reason", async () => {
  const abort = new AbortController();
  const running = run(["sleep", "600"], { signal: abort.signal });
  abort.abort(new Error("enough"));
  await assert.rejects(running, /^Error: enough$/);
  await assert.rejects(run(["true"], { signal: abort.signal }), /^Error: enough$/);
});

test("output past its bound ends the program", async () => {
  await assert.rejects(
    run(["sh", "-c", "yes"], { maxOutputBytes: 1000 }),
    /sh: wrote more than 1000 bytes to stdout/,
  );
});

test("a program that does not read its input is judged by its exit code", async () => {
  assert.equal((await run(["true"], { input: "x".repeat(1 << 20) })).exitCode, 0);
});

test("a descendant that keeps the pipes does not keep the caller", async () => {
  const { stdout } = await run(["sh", "-c", "setsid sleep 5 & echo $!"]);
  const pid = Number(stdout);
  assert(isAlive(pid));
  process.kill(pid);
});

test("the environment given is added to the agent's", async () => {
  assert.equal((await run(["sh", "-c", 'echo "$A-$LC_ALL"'], { env: { A: "b" } })).stdout, "b-C\n");
});
