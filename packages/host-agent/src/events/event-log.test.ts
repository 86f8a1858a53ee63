import { appendFileSync, mkdtempSync, readdirSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, expect, test } from "vitest";
import type { SandboxId } from "../ids.ts";
import { EventLog } from "./event-log.ts";

const ID = "sb000000000000000000" as SandboxId;
let dir: string;
beforeEach(() => {
  dir = mkdtempSync(join(tmpdir(), "rk-events-"));
});
afterEach(() => rmSync(dir, { recursive: true, force: true }));

let logs = 0;
const open = (options: { maxEvents?: number; segmentEvents?: number } = {}) =>
  EventLog.open({ dir, newLogId: () => `log-${++logs}`, maxEvents: 100, ...options });
const event = (reason: string) => ({
  sandboxId: ID,
  generation: 3n,
  kind: "paused" as const,
  reason,
  message: "",
  occurredAtUnixMs: 1,
});
const all = async (log: EventLog, after = 0n) =>
  (await Array.fromAsync(log.read({ after, follow: false, signal: new AbortController().signal }))).map(
    ({ number, reason }) => `${number} ${reason}`,
  );

test("events keep their numbers and the log its id through a restart", async () => {
  const first = await open();
  await Promise.all([first.append(event("a")), first.append(event("b"))]);
  await first.close();
  const second = await open();
  expect(second.logId).toBe(first.logId);
  await second.append(event("c"));
  expect(await all(second, 1n)).toEqual(["2 b", "3 c"]);
  await second.close();
});

test("a line that a crash cut off never was", async () => {
  const first = await open();
  await first.append(event("a"));
  await first.close();
  appendFileSync(
    join(
      dir,
      readdirSync(dir).find((name) => name.endsWith(".jsonl"))!,
    ),
    '{"number":"2","sand',
  );
  const second = await open();
  await second.append(event("b"));
  expect(await all(second)).toEqual(["1 a", "2 b"]);
  await second.close();
});

test("acknowledged segments go, and numbers are not given again", async () => {
  const log = await open({ segmentEvents: 2 });
  for (const reason of ["a", "b", "c"]) await log.append(event(reason));
  await log.acknowledge(log.logId, 3n);
  expect(await all(log)).toEqual(["3 c"]);
  await log.close();
  const again = await open({ segmentEvents: 2 });
  expect((await again.append(event("d"))).number).toBe(4n);
  await expect(again.acknowledge("another", 1n)).rejects.toMatchObject({ code: "wrong_state" });
  await expect(again.acknowledge(again.logId, 99n)).rejects.toMatchObject({ code: "invalid_request" });
  await again.close();
});

test("beyond its cap the log drops the oldest, and says up to where", async () => {
  const log = await open({ maxEvents: 4, segmentEvents: 2 });
  for (const reason of ["a", "b", "c", "d", "e"]) await log.append(event(reason));
  expect(log.droppedThrough).toBe(2n);
  expect(await all(log)).toEqual(["3 c", "4 d", "5 e"]);
  await log.close();
});

test("who follows gets what comes, until called off", async () => {
  const log = await open();
  const controller = new AbortController();
  const seen: string[] = [];
  const following = (async () => {
    for await (const { reason } of log.read({ after: 0n, follow: true, signal: controller.signal })) {
      seen.push(reason);
      if (seen.length === 2) controller.abort();
    }
  })();
  await log.append(event("a"));
  await log.append(event("b"));
  await following;
  expect(seen).toEqual(["a", "b"]);
  await log.close();
});
