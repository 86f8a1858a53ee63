/** The QMP client against a VMM that misbehaves in every way. */
import assert from "node:assert/strict";
import { once } from "node:events";
import { mkdtemp, rm } from "node:fs/promises";
import { createServer, type Server, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, test } from "vitest";
import { QmpClient, QmpError, type QmpEvent } from "./qmp.ts";

const GREETING = '{"QMP": {"version": {}, "capabilities": ["oob"]}}\r\n';

type Answer = (command: { execute: string; id: number; arguments: unknown }, socket: Socket) => void;

let dir: string;
let server: Server;
let sockets: Socket[];
beforeEach(async () => {
  dir = await mkdtemp(join(tmpdir(), "rk-qmp-"));
  sockets = [];
});
afterEach(async () => {
  for (const socket of sockets) socket.destroy();
  await new Promise((resolve) => server.close(resolve));
  await rm(dir, { recursive: true, force: true });
});

/** Greets, agrees to the capabilities, and leaves the rest to `answer`. */
async function fakeQemu(answer: Answer, greeting = GREETING): Promise<string> {
  const path = join(dir, "qmp.sock");
  server = createServer((socket) => {
    sockets.push(socket);
    socket.on("error", () => undefined);
    socket.write(greeting);
    let text = "";
    socket.on("data", (chunk) => {
      text += chunk.toString("utf8");
      const lines = text.split("\n");
      text = lines.pop() ?? "";
      for (const line of lines) {
        const command = JSON.parse(line) as { execute: string; id: number; arguments: unknown };
        if (command.execute === "qmp_capabilities") socket.write(`{"return": {}, "id": ${command.id}}\r\n`);
        else answer(command, socket);
      }
    });
  }).listen(path);
  await once(server, "listening");
  return path;
}

test("answers find their commands, in whatever order and pieces they come", async () => {
  const held: { id: number; socket: Socket }[] = [];
  const path = await fakeQemu(({ id }, socket) => {
    held.push({ id, socket });
    if (held.length < 2) return;
    for (const each of held.toReversed()) {
      const line = `{"return": {"status": "s${each.id}", "running": true, "unknown": [1]}, "id": ${each.id}}\r\n`;
      for (const byte of line) each.socket.write(byte);
    }
  });
  await using qmp = await QmpClient.connect(path, () => undefined);
  const answers = await Promise.all([
    qmp.command("query-status", {}, {}),
    qmp.command("query-status", {}, {}),
  ]);
  assert.deepEqual(
    answers.map((answer) => answer.status),
    ["s2", "s3"],
  );
});

test("events come through, between answers", async () => {
  const events: QmpEvent[] = [];
  const path = await fakeQemu(({ id }, socket) => {
    socket.write(`{"event": "STOP", "timestamp": {}}\r\n{"event": "SHUTDOWN", "data": {"guest": true}}\r\n`);
    socket.write(`{"return": {}, "id": ${id}}\r\n`);
  });
  await using qmp = await QmpClient.connect(path, (event) => events.push(event));
  await qmp.command("stop", {}, {});
  assert.deepEqual(events, [
    { name: "STOP", data: {} },
    { name: "SHUTDOWN", data: { guest: true } },
  ]);
});

test("a refusal is an error with QEMU's words; the connection goes on", async () => {
  const path = await fakeQemu(({ id, execute }, socket) => {
    socket.write(
      execute === "cont"
        ? `{"error": {"class": "GenericError", "desc": "not now"}, "id": ${id}}\r\n`
        : `{"return": {}, "id": ${id}}\r\n`,
    );
  });
  await using qmp = await QmpClient.connect(path, () => undefined);
  await assert.rejects(
    qmp.command("cont", {}, {}),
    (cause) => cause instanceof QmpError && cause.message === "cont: not now",
  );
  await qmp.command("stop", {}, {});
});

test("a command without an answer ends by its time-out or its signal, and a late answer is dropped", async () => {
  const late: (() => void)[] = [];
  const path = await fakeQemu(({ id, execute }, socket) => {
    if (execute === "stop") late.push(() => socket.write(`{"return": {}, "id": ${id}}\r\n`));
    else socket.write(`{"return": {"status": "paused", "running": false}, "id": ${id}}\r\n`);
  });
  await using qmp = await QmpClient.connect(path, () => undefined);
  await assert.rejects(qmp.command("stop", {}, { timeoutMs: 10 }), { code: "timeout" });
  const abort = new AbortController();
  const aborted = assert.rejects(qmp.command("stop", {}, { signal: abort.signal }), /enough/);
  abort.abort(new Error("enough"));
  await aborted;
  for (const send of late) send();
  assert.equal((await qmp.command("query-status", {}, {})).status, "paused");
});

test("an answer of another form is an error", async () => {
  const path = await fakeQemu(({ id }, socket) => socket.write(`{"return": {"status": 7}, "id": ${id}}\r\n`));
  await using qmp = await QmpClient.connect(path, () => undefined);
  await assert.rejects(qmp.command("query-status", {}, {}), /not understood/);
});

test("what is not QMP, or has no end, ends the connection and all who wait", async () => {
  for (const poison of ["not json\r\n", `"${"x".repeat(5 << 20)}`, "[]\r\n"]) {
    const path = await fakeQemu((_command, socket) => socket.write(poison));
    const qmp = await QmpClient.connect(path, () => undefined);
    await assert.rejects(qmp.command("stop", {}, {}));
    await qmp.closed;
    await assert.rejects(qmp.command("stop", {}, {}));
    for (const socket of sockets) socket.destroy();
    await new Promise((resolve) => server.close(resolve));
  }
  server = createServer();
});

test("an event that its handler cannot bear ends the connection, and nothing else", async () => {
  const path = await fakeQemu((_command, socket) =>
    socket.write(`{"event": "SHUTDOWN", "data": {"guest": true, "reason": {"toString": 0}}}\r\n`),
  );
  const qmp = await QmpClient.connect(path, ({ data }) => void String(data["reason"]));
  await assert.rejects(qmp.command("stop", {}, {}), /could not be handled/);
  assert.match((await qmp.closed).message, /could not be handled/);
});

test("a VMM that hangs up or never greets is noticed", async () => {
  const path = await fakeQemu((_command, socket) => socket.destroy());
  const qmp = await QmpClient.connect(path, () => undefined);
  await assert.rejects(qmp.command("stop", {}, {}));
  assert.ok((await qmp.closed) instanceof Error);
  await new Promise((resolve) => server.close(resolve));
  const silent = await fakeQemu(() => undefined, "");
  await assert.rejects(
    QmpClient.connect(silent, () => undefined, { timeoutMs: 20 }),
    { code: "timeout" },
  );
});
