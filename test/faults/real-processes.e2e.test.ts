/**
 * The fault suite with real processes, as `npm run faults -- --form processes`
 * plays it. It takes minutes: the long form (ROOKERY_LONG=1).
 */
import assert from "node:assert/strict";
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { readFileSync, readdirSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { eventually } from "../api.ts";
import { isAlive, repoDir } from "../product.ts";

const SEEDS = 20;
const OPERATIONS = 200;
const AT_ONCE = 2;

const isWanted = process.env["ROOKERY_LONG"] === "1" && process.getuid?.() === 0;

describe.skipIf(!isWanted)("real processes (in the long form: npm run test:long; needs root)", () => {
  test("whatever fails, nothing is lost, doubled or leaked", { timeout: 7_200_000 }, async () => {
    const run = start("--seeds", String(SEEDS), "--ops", String(OPERATIONS), "--parallel", String(AT_ONCE));
    let output = "";
    run.stdout?.setEncoding("utf8").on("data", (text: string) => {
      output += text;
    });
    await once(run, "close");
    const results = output
      .trim()
      .split("\n")
      .map((line) => JSON.parse(line) as { ok: boolean });
    console.log(output);
    expect(results.filter(({ ok }) => !ok)).toEqual([]);
    expect(results).toHaveLength(SEEDS);
  });

  test("a run that is killed leaves no process and no mount", { timeout: 300_000 }, async () => {
    const run = start("--seeds", "1", "--ops", "10000");
    try {
      await eventually("its agents run", 180_000, () => {
        const commands = descendantsOf(run.pid!).map((pid) => commandOf(pid));
        return commands.some((command) => command.includes("rookery-agent.mjs")) ? true : undefined;
      });
    } finally {
      const all = descendantsOf(run.pid!);
      run.kill("SIGKILL");
      await eventually("all of them are gone", 60_000, () => (all.some(isAlive) ? undefined : true));
      assert.ok(all.length > 5, `only ${all.length} processes`);
    }
    expect(readFileSync("/proc/self/mounts", "utf8")).not.toContain("rookery-faults");
  });
});

function start(...args: string[]): ChildProcess {
  const main = join(repoDir, "test/faults/main.ts");
  return spawn(process.execPath, [main, "--form", "processes", ...args], {
    cwd: repoDir,
    stdio: ["ignore", "pipe", "inherit"],
  });
}

/** As the kernel has it, through the namespaces of processes too. */
function descendantsOf(pid: number): number[] {
  const parents = new Map<number, number[]>();
  for (const name of readdirSync("/proc").filter((entry) => /^\d+$/.test(entry))) {
    const parent = Number(
      unlessGone(() => readFileSync(`/proc/${name}/stat`, "utf8"))
        .split(") ")
        .at(-1)
        ?.split(" ")[1],
    );
    parents.set(parent, [...(parents.get(parent) ?? []), Number(name)]);
  }
  const below = (one: number): number[] =>
    (parents.get(one) ?? []).flatMap((child) => [child, ...below(child)]);
  return below(pid);
}

function commandOf(pid: number): string {
  return unlessGone(() => readFileSync(`/proc/${pid}/cmdline`, "utf8"));
}

function unlessGone(read: () => string): string {
  try {
    return read();
  } catch (cause) {
    if (cause instanceof Error && "code" in cause && (cause.code === "ENOENT" || cause.code === "ESRCH"))
      return "";
    throw cause;
  }
}
