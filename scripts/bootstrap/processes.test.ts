import assert from "node:assert/strict";
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, test } from "vitest";
import { keepLogSmall, livePid, startDetached, stop } from "./processes.mjs";

const dir = mkdtempSync(join(tmpdir(), "rookery-logs-"));
afterAll(() => rmSync(dir, { recursive: true, force: true }));

test("a long log is kept once, and a short one goes on", () => {
  const log = join(dir, "agent.log");
  keepLogSmall(log, 10);
  assert.ok(!existsSync(log));
  writeFileSync(log, "1234567890");
  keepLogSmall(log, 10);
  assert.equal(readFileSync(log, "utf8"), "1234567890");
  for (const text of ["first, too long", "second, too long"]) {
    writeFileSync(log, text);
    keepLogSmall(log, 10);
    assert.ok(!existsSync(log));
    assert.equal(readFileSync(`${log}.1`, "utf8"), text);
  }
});

test("a process is ours by its pid, its start and its command line, and by nothing less", async () => {
  const paths = { runDir: join(dir, "run"), logDir: join(dir, "log") };
  for (const each of Object.values(paths)) mkdirSync(each);
  const argv = [process.execPath, "-e", "setInterval(() => undefined, 1000)", "rookery-agent"];
  const pid = startDetached(paths, "agent", { argv, env: {} });
  const file = join(paths.runDir, "agent.pid");
  const written = readFileSync(file, "utf8");
  try {
    assert.equal(livePid(paths, "agent"), pid);
    // The same pid, as if another product's agent had got it.
    writeFileSync(
      file,
      written.replace(/\n(\d+)/, (_, ticks) => `\n${Number(ticks) + 1}`),
    );
    assert.equal(livePid(paths, "agent"), undefined);
    // As if another program had got it.
    writeFileSync(join(paths.runDir, "postgres.pid"), `${pid}\n`);
    assert.equal(livePid(paths, "postgres"), undefined);
  } finally {
    writeFileSync(file, written);
    await stop(paths, "agent", 10_000);
  }
  assert.equal(livePid(paths, "agent"), undefined);
  assert.ok(!existsSync(file));
});

test("a process that makes way for another program is the same one at every moment", async () => {
  const paths = { runDir: join(dir, "run-exec"), logDir: join(dir, "log-exec") };
  for (const each of Object.values(paths)) mkdirSync(each);
  const program = join(dir, "rookery-agent");
  // In the middle of an exec the kernel shows an empty command line.
  writeFileSync(program, '#!/bin/sh\nexec "$0"\n', { mode: 0o755 });
  const pid = startDetached(paths, "agent", { argv: [program], env: {} });
  try {
    for (let look = 0; look < 20_000; look += 1) assert.equal(livePid(paths, "agent"), pid);
  } finally {
    await stop(paths, "agent", 10_000);
  }
});
