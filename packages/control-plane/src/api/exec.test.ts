import { afterAll, beforeAll, expect, test } from "vitest";
import { output } from "./testing/fake-services.ts";
import { openTestApi } from "./testing/test-api.ts";
import type { TestApi } from "./testing/test-api.ts";
import type { ExecInput, ExecResult } from "../service/services.ts";

let api: TestApi;
let url: string;
beforeAll(async () => {
  api = await openTestApi();
  url = `/v1/sandboxes/${(await api.call("POST", "/v1/sandboxes", {})).body.id}/exec`;
});
afterAll(() => api[Symbol.asyncDispose]());

async function answerTo(result: Partial<ExecResult>) {
  api.services.onExec = async () => ({ ...output({}), ...result });
  return (await api.call("POST", url, { cmd: "x" })).body;
}

test("what is asked reaches the service whole, with its defaults", async () => {
  const asked: ExecInput[] = [];
  api.services.onExec = async (input) => {
    asked.push(input);
    return output({});
  };
  await api.call("POST", url, { cmd: "ls" });
  await api.call("POST", url, {
    cmd: "echo $A",
    args: ["", "ä\n"],
    shell: true,
    cwd: "rel/dir",
    env: { A: "1" },
    user: "root",
    stdin: "ünput",
    timeout_sec: 0.5,
  });
  expect(asked[0]).toEqual({ cmd: "ls", args: [], shell: false, env: {}, timeoutSec: 30 });
  expect(asked[1]).toMatchObject({
    args: ["", "ä\n"],
    shell: true,
    cwd: "rel/dir",
    user: "root",
    timeoutSec: 0.5,
  });
  expect(Buffer.from(asked[1]?.stdin ?? []).toString()).toBe("ünput");
});

test("text comes as text", async () => {
  const body = await answerTo({ stdout: Buffer.from("grüße 💥\0\n"), stderr: Buffer.from("") });
  expect(body).toMatchObject({ stdout: "grüße 💥\0\n", stderr: "", encoding: "utf-8", truncated: false });
  expect(body).not.toHaveProperty("signal");
});

test("when either stream is not UTF-8, both come as base64", async () => {
  const bytes = Buffer.from([0xff, 0x00, 0xc3]);
  const body = await answerTo({ stdout: Buffer.from("text"), stderr: bytes, exitCode: 3 });
  expect(body).toMatchObject({
    encoding: "base64",
    stdout: Buffer.from("text").toString("base64"),
    stderr: bytes.toString("base64"),
    exit_code: 3,
  });
});

test.each([
  ["ü", 1],
  ["€", 1],
  ["€", 2],
  ["💥", 1],
  ["💥", 2],
  ["💥", 3],
])("a cut through %s after %i bytes leaves text", async (character, bytes) => {
  const stdout = Buffer.concat([Buffer.from("abc"), Buffer.from(character).subarray(0, bytes)]);
  expect(await answerTo({ stdout, truncated: true })).toMatchObject({ stdout: "abc", encoding: "utf-8" });
  // What was not cut is not text, and is kept whole.
  expect(await answerTo({ stdout })).toMatchObject({ stdout: stdout.toString("base64"), encoding: "base64" });
});

test("a cut between characters takes none away", async () => {
  const stdout = Buffer.from("abcü€💥");
  expect(await answerTo({ stdout, truncated: true })).toMatchObject({ stdout: "abcü€💥", truncated: true });
});

test("a view into a larger buffer shows its own bytes alone", async () => {
  const stdout = new Uint8Array(Buffer.from("xxhellosecret")).subarray(2, 7);
  expect(await answerTo({ stdout })).toMatchObject({ stdout: "hello" });
});

test("a time-out and a signal are told", async () => {
  const body = await answerTo({ timedOut: true, signal: "SIGKILL", exitCode: -1, durationMs: 30_000.4 });
  expect(body).toMatchObject({ timed_out: true, signal: "SIGKILL", exit_code: -1, duration_ms: 30_000 });
});

test("4 MiB of each stream come through", async () => {
  const stdout = Buffer.alloc(4 * 1024 * 1024, "a");
  const body = await answerTo({ stdout, stderr: stdout, truncated: true });
  expect(body.stdout.length + body.stderr.length).toBe(8 * 1024 * 1024);
});
