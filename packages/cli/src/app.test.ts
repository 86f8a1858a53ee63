import { strict as assert } from "node:assert";
import { run } from "@stricli/core";
import { test } from "vitest";
import { buildRookeryApp } from "./app.ts";

async function runWith(args: string[], code = 0) {
  const calls: [string, readonly string[]][] = [];
  const exits: number[] = [];
  let output = "";
  const write = (text: string): void => void (output += text);
  const app = buildRookeryApp(
    async (script, given) => {
      calls.push([script, given]);
      return code;
    },
    { version: "1.2.3", exit: (value) => void exits.push(value) },
  );
  const process = {
    stdout: { write },
    stderr: { write },
    exitCode: undefined as number | string | null | undefined,
  };
  await run(app, args, { process });
  return { calls, exits, output, exitCode: process.exitCode };
}

test("each command is a script of the repository, its flags passed on", async () => {
  assert.deepEqual((await runWith(["up", "--detach"])).calls, [["up.mjs", ["--detach"]]]);
  assert.deepEqual((await runWith(["down"])).calls, [["down.mjs", []]]);
  assert.deepEqual((await runWith(["doctor", "--json"])).calls, [["host.mjs", ["doctor", "--json"]]]);
  assert.deepEqual((await runWith(["image", "build"])).calls, [["host.mjs", ["image", "build", "base"]]]);
  assert.deepEqual((await runWith(["image", "list", "--json"])).calls, [
    ["host.mjs", ["image", "list", "--json"]],
  ]);
});

test("the script's exit code is the command's", async () => {
  assert.deepEqual((await runWith(["doctor"], 3)).exits, [3]);
});

test("what is not understood starts nothing", async () => {
  const { calls, exitCode, output } = await runWith(["dance"]);
  assert.deepEqual(calls, []);
  assert.notEqual(exitCode, 0);
  assert.match(output, /dance/);
});
