import { strict as assert } from "node:assert";
import { createServer } from "node:net";
import { afterEach, beforeEach, expect, test } from "vitest";
import type { CommandEvent } from "./commands.ts";
import { EnvdClient } from "./envd-client.ts";
import { GUEST_LIMITS } from "./limits.ts";
import { signalOfStatus } from "./process-calls.ts";
import type { Command } from "./process-calls.ts";
import {
  beginStream,
  exitFrame,
  killedFrame,
  lastFrame,
  readBody,
  readStart,
  startFakeEnvd,
  startFrame,
  stdoutFrame,
} from "./testing/fake-envd.ts";
import type { Answer } from "./testing/fake-envd.ts";

const START = "POST /process.Process/Start";
const KILL = "POST /process.Process/SendSignal";
const never = new AbortController().signal;
const ok: Answer = (_request, response) =>
  void response.writeHead(200, { "content-type": "application/proto" }).end();

function command(overrides: Partial<Command> = {}): Command {
  return {
    cmd: "true",
    args: [],
    shell: false,
    env: {},
    stdin: new Uint8Array(),
    timeoutMs: 5_000,
    ...overrides,
  };
}

let envd: EnvdClient;
beforeEach(() => {
  envd = new EnvdClient({
    ...GUEST_LIMITS,
    answerMs: 300,
    fileIdleMs: 300,
    killGraceMs: 200,
    connectMs: 300,
  });
});
afterEach(() => envd.close());

const exec = (target: Parameters<EnvdClient["exec"]>[0], overrides: Partial<Command> = {}, signal = never) =>
  envd.exec(target, command(overrides), { maxOutputBytes: 1_000 }, signal);

test("a command's output, exit code and arguments pass as they are", async () => {
  await using fake = await startFakeEnvd({
    [START]: async (request, response) => {
      assert.equal(request.headers["x-access-token"], "token");
      assert.equal(request.headers.authorization, `Basic ${Buffer.from("ann:").toString("base64")}`);
      const { process, stdin } = await readStart(request);
      assert.equal(process!.cmd, "/bin/bash");
      assert.deepEqual(process!.args, ["-lc", "echo hi"]);
      assert.deepEqual(process!.envs, { A: "1" });
      assert.equal(process!.cwd, "/tmp");
      assert.equal(stdin, false);
      beginStream(response);
      response.write(startFrame(7));
      response.write(stdoutFrame(Buffer.from("hi\n")));
      response.end(Buffer.concat([exitFrame(3), lastFrame()]));
    },
  });
  const result = await exec(fake.target, {
    cmd: "echo hi",
    shell: true,
    env: { A: "1" },
    cwd: "/tmp",
    user: "ann",
  });
  assert.equal(Buffer.from(result.stdout).toString(), "hi\n");
  assert.deepEqual(
    { ...result, stdout: 0, stderr: 0, durationMs: 0 },
    {
      stdout: 0,
      stderr: 0,
      exitCode: 3,
      signal: undefined,
      timedOut: false,
      truncated: false,
      durationMs: 0,
    },
  );
});

test("calls one after another use one connection", async () => {
  const ports = new Set<number | undefined>();
  await using fake = await startFakeEnvd({
    [START]: (request, response) => {
      ports.add(request.socket.remotePort);
      beginStream(response);
      response.end(Buffer.concat([startFrame(7), exitFrame(0), lastFrame()]));
    },
  });
  for (let i = 0; i < 20; i += 1) await exec(fake.target);
  assert.equal(ports.size, 1);
});

test("output past the cap is read and dropped, and the answer says so", async () => {
  await using fake = await startFakeEnvd({
    [START]: async (_request, response) => {
      beginStream(response);
      response.write(startFrame(7));
      for (let i = 0; i < 500; i += 1) {
        if (!response.write(stdoutFrame(Buffer.alloc(10_000, 97)))) {
          await new Promise((resolve) => response.once("drain", resolve));
        }
      }
      response.end(Buffer.concat([exitFrame(0), lastFrame()]));
    },
  });
  const result = await exec(fake.target);
  assert.equal(result.stdout.byteLength, 1_000);
  assert.equal(result.truncated, true);
  assert.equal(result.exitCode, 0);
});

test("a command past its time is killed, and its answer says so", async () => {
  let end: (() => void) | undefined;
  await using fake = await startFakeEnvd({
    [START]: (_request, response) => {
      beginStream(response);
      response.write(startFrame(7));
      end = () => response.end(Buffer.concat([killedFrame(), lastFrame()]));
    },
    [KILL]: (request, response) => {
      void ok(request, response);
      end!();
    },
  });
  const result = await exec(fake.target, { timeoutMs: 30 });
  assert.equal(result.timedOut, true);
  assert.equal(result.signal, "SIGKILL");
  assert.equal(result.exitCode, -1);
});

test("a guest that reports no end after SIGKILL does not hold the caller", async () => {
  await using fake = await startFakeEnvd({
    [START]: (_request, response) => {
      beginStream(response);
      response.write(startFrame(7));
    },
    [KILL]: ok,
  });
  const result = await exec(fake.target, { timeoutMs: 30 });
  assert.deepEqual([result.timedOut, result.signal, result.exitCode], [true, "SIGKILL", -1]);
});

test("an abort kills the process and is thrown as its reason", async () => {
  await using fake = await startFakeEnvd({
    [START]: (_request, response) => {
      beginStream(response);
      response.write(startFrame(7));
    },
    [KILL]: ok,
  });
  const abort = new AbortController();
  const running = exec(fake.target, {}, abort.signal);
  running.catch(() => undefined);
  await expect.poll(() => fake.requests.length).toBe(1);
  abort.abort(new Error("gone"));
  await assert.rejects(running, /^Error: gone$/);
  assert(fake.requests.includes(KILL));
});

test("leaving a stream of output early kills the process", async () => {
  await using fake = await startFakeEnvd({
    [START]: (_request, response) => {
      beginStream(response);
      response.write(startFrame(7));
      response.write(stdoutFrame(Buffer.from("x")));
    },
    [KILL]: ok,
  });
  const seen: CommandEvent["kind"][] = [];
  for await (const event of envd.execStream(fake.target, command(), never)) {
    seen.push(event.kind);
    if (event.kind === "stdout") break;
  }
  assert.deepEqual(seen, ["start", "stdout"]);
  assert(fake.requests.includes(KILL));
});

test("input is sent in pieces and closed; a command that does not read it is not at fault", async () => {
  const pieces: Buffer[] = [];
  let end: (() => void) | undefined;
  await using fake = await startFakeEnvd({
    [START]: async (request, response) => {
      assert.equal((await readStart(request)).stdin, true);
      beginStream(response);
      response.write(startFrame(7));
      end = () => response.end(Buffer.concat([exitFrame(0), lastFrame()]));
    },
    "POST /process.Process/SendInput": async (request, response) => {
      pieces.push(await readBody(request));
      response
        .writeHead(404, { "content-type": "application/json" })
        .end('{"code":"not_found","message":"gone"}');
      end!();
    },
  });
  assert.equal((await exec(fake.target, { stdin: Buffer.from("in") })).exitCode, 0);
  assert.equal(pieces.length, 1);
});

const hostile: Record<string, Answer> = {
  "a huge length prefix": (_request, response) => {
    beginStream(response);
    response.write(Buffer.from([0, 0x7f, 0xff, 0xff, 0xff, 1, 2, 3]));
  },
  "a message that is no protobuf": (_request, response) => {
    beginStream(response);
    response.end(Buffer.from([0, 0, 0, 0, 2, 0xff, 0xff]));
  },
  "a message nested beyond measure": (_request, response) => {
    beginStream(response);
    const groups = Buffer.alloc(500_000, 0x7b); // start of unknown group 15, again and again
    const head = Buffer.from([0, 0, 0, 0, 0]);
    head.writeUInt32BE(groups.byteLength, 1);
    response.end(Buffer.concat([head, groups]));
  },
  "a stream that breaks off": (_request, response) => {
    beginStream(response);
    response.write(startFrame(7), () => response.destroy());
  },
  "a stream without an end": (_request, response) => {
    beginStream(response);
    response.end(startFrame(7));
  },
  "output before the start": (_request, response) => {
    beginStream(response);
    response.end(Buffer.concat([stdoutFrame(Buffer.from("x")), exitFrame(0), lastFrame()]));
  },
  "two starts": (_request, response) => {
    beginStream(response);
    response.end(Buffer.concat([startFrame(1), startFrame(2), exitFrame(0), lastFrame()]));
  },
  "an end that is no JSON": (_request, response) => {
    beginStream(response);
    response.end(Buffer.concat([startFrame(1), exitFrame(0), lastFrame("{{{{")]));
  },
  "an end nested beyond measure": (_request, response) => {
    beginStream(response);
    response.end(Buffer.concat([startFrame(1), exitFrame(0), lastFrame("[".repeat(60_000))]));
  },
  "another content type": (_request, response) =>
    void response.writeHead(200, { "content-type": "text/html" }).end("<p>"),
  "an endless error": async (_request, response) => {
    response.writeHead(500, { "content-type": "application/json" });
    while (response.write("x".repeat(10_000))) await new Promise((resolve) => setImmediate(resolve));
  },
  "no answer at all": () => undefined,
  "headers beyond measure": (_request, response) => {
    response.socket!.end(`HTTP/1.1 200 OK\r\nx: ${"y".repeat(100_000)}\r\n\r\n`);
  },
  "no HTTP": (_request, response) => void response.socket!.end("\0\0\0\0 hello"),
};
for (const [name, answer] of Object.entries(hostile)) {
  test(`a guest that sends ${name} is a guest_error`, async () => {
    await using fake = await startFakeEnvd({ [START]: answer, [KILL]: ok });
    await assert.rejects(exec(fake.target), { name: "RookeryError", code: "guest_error" });
  });
}

test("what the guest refuses has the code of its cause", async () => {
  let refusal = "";
  await using fake = await startFakeEnvd({
    [START]: (_request, response) => {
      beginStream(response);
      response.end(lastFrame(refusal));
    },
  });
  const cases: [string, Partial<Command>, string][] = [
    ["invalid_argument", {}, "invalid_request"],
    ["unauthenticated", { user: "nobody-here" }, "invalid_request"],
    ["unauthenticated", {}, "guest_error"],
    ["deadline_exceeded", {}, "timeout"],
    ["internal", {}, "guest_error"],
    ["__proto__", {}, "guest_error"],
  ];
  for (const [code, overrides, expected] of cases) {
    refusal = JSON.stringify({ error: { code, message: "wo\u001brds\u202e" } });
    const error = await exec(fake.target, overrides).then(
      () => assert.fail("it was not refused"),
      (error: Error & { code: string }) => error,
    );
    assert.equal(error.code, expected);
    if (code === "invalid_argument") assert.equal(error.message, "wo rds");
  }
});

test("waiting for health outlasts a guest that refuses, hangs and answers nonsense", async () => {
  // A port that nobody listens on yet.
  const placeholder = createServer().listen(0, "127.0.0.1");
  await new Promise((resolve) => placeholder.once("listening", resolve));
  const { port } = placeholder.address() as { port: number };
  await new Promise((resolve) => placeholder.close(resolve));

  const waiting = envd.waitHealthy({ host: "127.0.0.1", port }, never);
  let answers = 0;
  const server = createServer((socket) => {
    answers += 1;
    socket.on("error", () => undefined).resume();
    if (answers === 1) return; // hangs
    if (answers === 2) socket.end("nonsense");
    else socket.write("HTTP/1.1 204 No Content\r\n\r\n");
  });
  server.listen(port, "127.0.0.1");
  await waiting;
  await envd.close();
  await new Promise((resolve) => server.close(resolve));
});

test("an identity is given again until it is taken, and a refusal of it is final", async () => {
  let tries = 0;
  await using fake = await startFakeEnvd({
    "POST /init": (_request, response) => {
      tries += 1;
      if (tries < 3) response.destroy();
      else if (tries === 3) response.writeHead(204).end();
      else response.writeHead(500).end('{"code":500,"message":"init failed at clock"}');
    },
  });
  const init = {
    restoreId: "",
    sandboxId: "",
    hostname: "",
    machineId: "",
    timestamp: "",
    entropy: "",
    envVars: {},
    accessToken: "",
    defaultUser: "",
    growRootFs: false,
  };
  await envd.init(fake.target, init, never);
  assert.equal(tries, 3);
  await assert.rejects(envd.init(fake.target, init, never), {
    code: "guest_error",
    message: "init failed at clock",
  });
  assert.equal(tries, 4);
});

test("waiting for health ends with the signal's reason", async () => {
  const abort = new AbortController();
  const waiting = envd.waitHealthy({ host: "127.0.0.1", port: 1 }, abort.signal);
  abort.abort(new Error("enough"));
  await assert.rejects(waiting, /^Error: enough$/);
});

test("more calls at once than the bound are refused", async () => {
  await envd.close();
  envd = new EnvdClient({ ...GUEST_LIMITS, calls: 2, killGraceMs: 50 });
  await using fake = await startFakeEnvd({
    [START]: (_request, response) => {
      beginStream(response);
      response.write(startFrame(7));
    },
    [KILL]: ok,
  });
  const abort = new AbortController();
  const running = [exec(fake.target, {}, abort.signal), exec(fake.target, {}, abort.signal)];
  await assert.rejects(exec(fake.target), { code: "rate_limited" });
  abort.abort(new Error("done"));
  await Promise.allSettled(running);
});

test("signals have their names", () => {
  assert.equal(signalOfStatus("signal: killed"), "SIGKILL");
  assert.equal(signalOfStatus("signal: segmentation fault (core dumped)"), "SIGSEGV");
  assert.equal(signalOfStatus("signal: signal 35"), "SIG35");
  assert.equal(signalOfStatus("signal: __proto__"), undefined);
  assert.equal(signalOfStatus("exit status 1"), undefined);
});
