import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { Code, ConnectError, createClient } from "@connectrpc/connect";
import type { Client } from "@connectrpc/connect";
import { createConnectTransport } from "@connectrpc/connect-node";
import { process as wire } from "@rookery/protocol/envd";
import { afterAll, beforeAll, describe, test, vi } from "vitest";
import { ACCESS_TOKEN, EnvdProcess } from "../testing/envd-process.ts";

let envd: EnvdProcess;
beforeAll(async () => {
  envd = await EnvdProcess.start();
  assert.equal((await envd.init()).status, 204);
});
afterAll(async () => {
  envd.assertAlive();
  await envd[Symbol.asyncDispose]();
});

interface Run {
  pid: number;
  stdout: string;
  stderr: string;
  end: wire.ProcessEvent_EndEvent | undefined;
  keepalives: number;
}

function connect(
  useBinaryFormat: boolean,
  headers: Record<string, string> = {},
): Client<typeof wire.Process> {
  return createClient(
    wire.Process,
    createConnectTransport({
      baseUrl: envd.url,
      httpVersion: "1.1",
      useBinaryFormat,
      interceptors: [
        (next) => (request) => {
          const all = { "x-access-token": ACCESS_TOKEN, ...headers };
          for (const [name, value] of Object.entries(all)) request.header.set(name, value);
          return next(request);
        },
      ],
    }),
  );
}

function asUser(name: string): Record<string, string> {
  return { authorization: `Basic ${Buffer.from(`${name}:`).toString("base64")}` };
}

async function collect(
  events: AsyncIterable<wire.StartResponse | wire.ConnectResponse>,
  onStart: (pid: number) => void = () => {},
): Promise<Run> {
  const run: Run = { pid: 0, stdout: "", stderr: "", end: undefined, keepalives: 0 };
  for await (const { event } of events) {
    const it = event!.event;
    if (it.case === "start") {
      run.pid = it.value.pid;
      onStart(run.pid);
    } else if (it.case === "keepalive") run.keepalives += 1;
    else if (it.case === "end") run.end = it.value;
    else if (it.case === "data") {
      const { output } = it.value;
      assert.ok(output.case === "stdout" || output.case === "stderr");
      run[output.case] += Buffer.from(output.value).toString();
    }
  }
  return run;
}

const shell = (script: string) => ({ cmd: "/bin/sh", args: ["-c", script] });

async function rejection(promise: Promise<unknown>): Promise<ConnectError> {
  try {
    await promise;
  } catch (error) {
    return ConnectError.from(error);
  }
  throw new assert.AssertionError({ message: "it was not rejected" });
}

const isGone = (pid: number) => {
  try {
    // A zombie that init has not reaped yet is gone for all that matters.
    return / [ZX] /.test(readFileSync(`/proc/${pid}/stat`, "utf8"));
  } catch {
    return true;
  }
};

describe.each([
  { codec: "JSON", binary: false },
  { codec: "binary", binary: true },
])("process.Process in $codec", ({ binary }) => {
  test("Start gives start, output and end", async () => {
    const run = await collect(connect(binary).start({ process: shell("echo out; echo err >&2; exit 3") }));
    assert.ok(run.pid > 0);
    assert.equal(run.stdout, "out\n");
    assert.equal(run.stderr, "err\n");
    assert.deepEqual(
      { ...run.end, $typeName: undefined },
      { $typeName: undefined, exitCode: 3, exited: true, status: "exit status 3", error: "exit status 3" },
    );
  });

  test("a process runs as the default user, with its environment, in the default folder", async () => {
    const run = await collect(
      connect(binary).start({
        process: { ...shell("id -un; pwd; env | sort"), envs: { MINE: "a=b", FROM_INIT: "overridden" } },
      }),
    );
    const [user, folder, ...env] = run.stdout.trim().split("\n");
    assert.equal(user, "nobody");
    assert.equal(folder, "/tmp");
    for (const line of [
      "MINE=a=b",
      "FROM_INIT=overridden",
      "USER=nobody",
      "LOGNAME=nobody",
      "HOME=/nonexistent",
    ]) {
      assert.ok(env.includes(line), line);
    }
    assert.ok(!env.some((line) => line.startsWith("ROOKERY_")));
  });

  test("Basic credentials pick the user, with its groups and no more rights", async () => {
    const id = { process: shell("id -u; id -g; grep -E '^(Groups|CapEff|NoNewPrivs)' /proc/self/status") };
    const nobody = await collect(connect(binary, asUser("nobody")).start(id));
    assert.match(
      nobody.stdout,
      /^65534\n65534\nGroups:\t65534 \nCapEff:\t0000000000000000\nNoNewPrivs:\t0\n$/,
    );
    const root = await collect(connect(binary, asUser("root")).start(id));
    assert.match(root.stdout, /^0\n0\nGroups:\t0 \n/);
    assert.doesNotMatch(root.stdout, /CapEff:\t0000000000000000/);
    // uucp is in a group of its own only; sync has another gid than uid.
    const sync = await collect(connect(binary, asUser("sync")).start(id));
    assert.match(sync.stdout, /^4\n65534\n/);
  });

  test("an unknown user is unauthenticated", async () => {
    const error = await rejection(collect(connect(binary, asUser("x y")).start({ process: shell("true") })));
    assert.equal(error.code, Code.Unauthenticated);
    assert.equal(error.rawMessage, "invalid username: 'x y'");
  });

  test("a missing folder, a missing program and a forbidden one are invalid arguments", async () => {
    const start = (config: { cmd: string; cwd?: string }) =>
      rejection(collect(connect(binary).start({ process: config })));
    const cwd = await start({ cmd: "true", cwd: "/no/such" });
    assert.equal(cwd.code, Code.InvalidArgument);
    assert.equal(cwd.rawMessage, "cwd '/no/such' does not exist");
    const program = await start({ cmd: "/no/such" });
    assert.equal(program.code, Code.InvalidArgument);
    assert.match(program.rawMessage, /^error starting process '\/no\/such': no such file or directory$/);
    const forbidden = await start({ cmd: "/etc/passwd" });
    assert.equal(forbidden.code, Code.InvalidArgument);
    assert.match(forbidden.rawMessage, /permission denied$/);
  });

  test("input reaches the process, and CloseStdin ends it", async () => {
    const client = connect(binary);
    const run = await collect(client.start({ process: { cmd: "cat" }, tag: "cat" }), (pid) => {
      const process = { selector: { case: "tag", value: "cat" } } as const;
      void (async () => {
        const input = { input: { case: "stdin", value: Buffer.from("one ") } } as const;
        await client.sendInput({ process, input });
        await client.streamInput(
          (async function* () {
            yield { event: { case: "start", value: { process: { selector: { case: "pid", value: pid } } } } };
            yield { event: { case: "keepalive", value: {} } };
            for (const word of ["two ", "three"]) {
              const input = { input: { case: "stdin", value: Buffer.from(word) } } as const;
              yield { event: { case: "data", value: { input } } };
            }
          })() as AsyncIterable<never>,
        );
        await client.closeStdin({ process });
      })();
    });
    assert.equal(run.stdout, "one two three");
    assert.equal(run.end?.exitCode, 0);
  });

  test("without stdin a process reads from /dev/null, and input is refused", async () => {
    const client = connect(binary);
    const run = await collect(client.start({ process: { cmd: "cat" }, stdin: false }));
    assert.equal(run.end?.exitCode, 0);
    let error: ConnectError | undefined;
    await collect(client.start({ process: shell("sleep 30"), stdin: false, tag: "deaf" }), () => {
      void (async () => {
        const process = { selector: { case: "tag", value: "deaf" } } as const;
        const input = { input: { case: "stdin", value: Buffer.from("x") } } as const;
        error = await rejection(client.sendInput({ process, input }));
        await client.sendSignal({ process, signal: wire.Signal.SIGKILL });
      })();
    });
    assert.match(error!.rawMessage, /stdin not enabled or closed/);
  });

  test("SendSignal reaches the whole process group", async () => {
    const client = connect(binary);
    let child = 0;
    const stream = client.start({ process: shell("sleep 1000 & echo $!; wait") });
    let pid = 0;
    for await (const { event } of stream) {
      const it = event!.event;
      if (it.case === "start") pid = it.value.pid;
      else if (it.case === "data") {
        child = Number(Buffer.from(it.value.output.value!).toString());
        await client.sendSignal({
          process: { selector: { case: "pid", value: pid } },
          signal: wire.Signal.SIGTERM,
        });
      } else if (it.case === "end") {
        assert.deepEqual(
          [it.value.exitCode, it.value.exited, it.value.status, it.value.error],
          [-1, false, "signal: terminated", "signal: terminated"],
        );
      }
    }
    await vi.waitFor(() => assert.ok(isGone(child)));
  });

  test("the deadline kills the process group and ends the stream with deadline_exceeded", async () => {
    const client = connect(binary);
    let child = 0;
    const error = await rejection(
      (async () => {
        for await (const { event } of client.start(
          { process: shell("sleep 1000 & echo $!; wait") },
          // The client's own clock must not be what ends it.
          { headers: { "connect-timeout-ms": "400" } },
        )) {
          if (event!.event.case === "data")
            child = Number(Buffer.from(event!.event.value.output.value!).toString());
        }
      })(),
    );
    assert.equal(error.code, Code.DeadlineExceeded);
    await vi.waitFor(() => assert.ok(child > 0 && isGone(child)));
  });

  test("a client that goes away leaves its process running, and Connect finds it and its end", async () => {
    const client = connect(binary);
    const aborter = new AbortController();
    const tag = `left-${binary}`;
    let pid = 0;
    await rejection(
      collect(
        client.start(
          { process: shell("read line; echo got $line; exit 7"), tag },
          { signal: aborter.signal },
        ),
        (started) => {
          pid = started;
          aborter.abort();
        },
      ),
    );
    const listed = await client.list({});
    assert.deepEqual(
      listed.processes.filter((process) => process.tag === tag).map((process) => process.pid),
      [pid],
    );
    const process = { selector: { case: "tag", value: tag } } as const;
    const run = await collect(client.connect({ process }), () => {
      void client.sendInput({
        process,
        input: { input: { case: "stdin", value: Buffer.from("line\n") } },
      });
    });
    assert.deepEqual([run.pid, run.stdout, run.end?.exitCode], [pid, "got line\n", 7]);
    // Its end is kept for a while, and nothing but its end.
    const late = await collect(client.connect({ process: { selector: { case: "pid", value: pid } } }));
    assert.deepEqual([late.pid, late.stdout, late.end?.exitCode], [pid, "", 7]);
    const error = await rejection(client.sendSignal({ process, signal: wire.Signal.SIGKILL }));
    assert.equal(error.code, Code.NotFound);
  });

  test("output that nobody takes stops the process, not envd", async () => {
    const client = connect(binary);
    const events = client.start({ process: { cmd: "cat", args: ["/dev/zero"] }, tag: `flood-${binary}` });
    const stream = events[Symbol.asyncIterator]();
    await stream.next();
    const residentKib = () =>
      Number(/VmRSS:\s+(\d+)/.exec(readFileSync(`/proc/${envd.pid}/status`, "utf8"))?.[1]);
    const before = residentKib();
    const catPid = (await client.list({})).processes.find(({ tag }) => tag === `flood-${binary}`)!.pid;
    // It waits for its pipe once all buffers on the way are full.
    await vi.waitFor(() => assert.match(readFileSync(`/proc/${catPid}/wchan`, "utf8"), /pipe_write/), 10_000);
    assert.ok(residentKib() - before < 64 * 1024, `${residentKib() - before} KiB`);
    await client.sendSignal({
      process: { selector: { case: "tag", value: `flood-${binary}` } },
      signal: wire.Signal.SIGKILL,
    });
    await stream.return?.();
  });
});

test("all output is told before the end, however much it is", async () => {
  const run = await collect(connect(true).start({ process: shell("seq 200000; seq 1000 >&2") }));
  assert.equal(run.stdout.length, 1_288_895);
  assert.equal(run.stderr.length, 3_893);
});

test("a background descendant that holds the output delays no end, and lives on", async () => {
  const client = connect(true);
  const run = await collect(
    client.start({ process: shell("(sleep 0.3; echo late; echo late >&2; exec sleep 1000) & echo $!") }),
  );
  const child = Number(run.stdout);
  assert.equal(run.end?.exitCode, 0);
  await vi.waitFor(() => assert.match(readFileSync(`/proc/${child}/cmdline`, "utf8"), /^sleep\0/), 5000);
  process.kill(child, "SIGKILL");
});

test("/dev/stderr can be opened by the process: its output is a pipe", async () => {
  const run = await collect(
    connect(true).start({ process: shell("echo x >/dev/stderr; echo y >/dev/stdout") }),
  );
  assert.deepEqual([run.stdout, run.stderr], ["y\n", "x\n"]);
});

test("a process leads its own session and holds nothing of envd", async () => {
  const run = await collect(
    connect(true).start({ process: shell("echo $$ $(cut -d' ' -f5,6 /proc/$$/stat); ls /proc/$$/fd") }),
  );
  const [ids, ...fds] = run.stdout.trim().split("\n");
  const [pid, group, session] = ids!.split(" ");
  assert.deepEqual([group, session], [pid, pid]);
  assert.deepEqual(fds, ["0", "1", "2"]);
});

test("silence is broken by keepalives as often as asked", async () => {
  const run = await collect(
    connect(true, { "keepalive-ping-interval": "1" }).start({ process: shell("sleep 1.5") }),
  );
  assert.equal(run.keepalives, 1);
});

test("what cannot be run is refused with the field's name", async () => {
  const client = connect(true);
  const long = "x".repeat(131_072);
  const cases: [{ cmd: string; args?: string[]; envs?: Record<string, string>; cwd?: string }, RegExp][] = [
    [{ cmd: "" }, /process\.cmd/],
    [{ cmd: "a\0b" }, /process\.cmd holds a NUL/],
    [{ cmd: "true", args: ["a\0"] }, /process\.args/],
    [{ cmd: "true", args: [long] }, /process\.args/],
    [{ cmd: "true", args: Array.from({ length: 20 }, () => "x".repeat(100_000)) }, /exceed/],
    [{ cmd: "true", envs: { "A=B": "" } }, /process\.envs/],
    [{ cmd: "true", envs: { A: "\0" } }, /process\.envs/],
    [{ cmd: "true", cwd: "/tmp\0" }, /process\.cwd/],
    [{ cmd: "true", cwd: "~other/x" }, /process\.cwd/],
    [{ cmd: "true", cwd: "/etc/passwd" }, /not a directory/],
  ];
  for (const [config, message] of cases) {
    const error = await rejection(collect(client.start({ process: config })));
    assert.equal(error.code, Code.InvalidArgument, String(message));
    assert.match(error.rawMessage, message);
  }
  const pty = await rejection(collect(client.start({ process: shell("true"), pty: {} })));
  assert.equal(pty.code, Code.Unimplemented);
});

test("unknown processes are not found, and a selector is needed", async () => {
  const client = connect(true);
  const none = { selector: { case: "pid", value: 4_194_305 } } as const;
  const signal = wire.Signal.SIGKILL;
  for (const promise of [
    client.sendSignal({ process: none, signal }),
    client.closeStdin({ process: none }),
    client.update({ process: none }),
    collect(client.connect({ process: { selector: { case: "tag", value: "none" } } })),
  ]) {
    assert.equal((await rejection(promise)).code, Code.NotFound);
  }
  assert.equal((await rejection(client.sendSignal({ signal }))).code, Code.InvalidArgument);
});
