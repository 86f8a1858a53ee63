import assert from "node:assert/strict";
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, test } from "vitest";
import { keepLogSmall } from "./processes.mjs";

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
