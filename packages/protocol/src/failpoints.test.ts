import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, expect, test } from "vitest";
import { failpointNames, Failpoints } from "./failpoints.ts";

let dir: string;
beforeEach(() => {
  dir = mkdtempSync(join(tmpdir(), "rk-failpoints-"));
});
afterEach(() => rmSync(dir, { recursive: true, force: true }));

const known = failpointNames({ create: [{ name: "thaw" }] });

test("unarmed failpoints do nothing", () => {
  const failpoints = new Failpoints({ known });
  void failpoints.reach("create.thaw.before");
  expect([...failpoints.hits]).toEqual([]);
});

test("a specification fails as often as it says, and hits are written down", () => {
  const hitsFile = join(dir, "hits");
  const failpoints = new Failpoints({ known, specification: "create.thaw.after=error*1", hitsFile });
  void failpoints.reach("create.thaw.before");
  expect(() => failpoints.reach("create.thaw.after")).toThrow("failpoint create.thaw.after");
  void failpoints.reach("create.thaw.after");
  expect(readFileSync(hitsFile, "utf8").split("\n").filter(Boolean)).toEqual([
    "create.thaw.before",
    "create.thaw.after",
    "create.thaw.after",
  ]);
});

test("a control file arms at run time, and is used up", () => {
  const controlFile = join(dir, "failpoints.json");
  const failpoints = new Failpoints({ known, controlFile });
  void failpoints.reach("create.thaw.before");
  writeFileSync(controlFile, JSON.stringify({ "create.thaw.before": "error*1" }));
  expect(() => failpoints.reach("create.thaw.before")).toThrow("failpoint");
  void failpoints.reach("create.thaw.before");
  expect(JSON.parse(readFileSync(controlFile, "utf8"))).toEqual({ "create.thaw.before": "error*0" });
});

test("names that do not exist, and words that mean nothing, are mistakes of the test", () => {
  expect(() => new Failpoints({ known, specification: "create.thaww.before=error" })).toThrow(
    "not in the registry",
  );
  expect(() => new Failpoints({ known, specification: "create.thaw.before=explode" })).toThrow(
    "not a failpoint action",
  );
});
