import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, test } from "vitest";
import { ACCESS_TOKEN, EnvdProcess, initBody } from "../testing/envd-process.ts";

describe("POST /init", () => {
  let envd: EnvdProcess;
  beforeAll(async () => {
    envd = await EnvdProcess.start();
  });
  afterAll(async () => {
    await envd[Symbol.asyncDispose]();
  });

  test("before it, only /health answers", async () => {
    assert.equal((await envd.fetch("/health")).status, 204);
    for (const path of ["/metrics", "/envs", "/files?path=/etc/hostname"]) {
      assert.equal((await envd.fetch(path)).status, 401, path);
    }
    const rpc = await envd.fetch("/process.Process/List", {
      method: "POST",
      headers: { "content-type": "application/json", "x-access-token": "" },
      body: "{}",
    });
    assert.equal(rpc.status, 401);
  });

  test("a malformed body is a 400 that names the field, and leaves envd closed", async () => {
    const cases: [unknown, RegExp][] = [
      [{ ...initBody(), hostname: "-bad-" }, /hostname/],
      [{ ...initBody(), machineId: "xyz" }, /machineId/],
      [{ ...initBody(), envVars: { "A=B": "x" } }, /envVars/],
      [{ ...initBody(), envVars: { A: "nul\0" } }, /envVars/],
      [{ ...initBody(), timestamp: "2026-13-01T00:00:00Z" }, /timestamp/],
      [{ ...initBody(), growRootFs: "yes" }, /growRootFs/],
      [[], /init/],
    ];
    for (const [body, message] of cases) {
      const answer = await envd.init(body);
      assert.equal(answer.status, 400);
      assert.match(((await answer.json()) as { message: string }).message, message);
    }
    assert.equal((await envd.fetch("/envs")).status, 401);
  });

  test("a failing step is a 500 that names it, and leaves envd closed", async () => {
    const answer = await envd.init(initBody({ defaultUser: "no-such-user" }));
    assert.equal(answer.status, 500);
    assert.deepEqual(await answer.json(), {
      code: 500,
      message: "init failed at default user: there is no user 'no-such-user'",
    });
    assert.equal((await envd.fetch("/envs")).status, 401);
  });

  test("it sets names and environment, and opens envd to its token alone", async () => {
    const body = initBody({ hostname: "sbaaa" });
    const answer = await envd.init(body);
    assert.equal(answer.status, 204);
    assert.equal(answer.headers.get("x-envd-version"), "0.6.13");
    const read = (name: string) => readFileSync(join(envd.directory, name), "utf8");
    assert.equal(read("hostname"), "sbaaa\n");
    assert.equal(read("machine-id"), `${body.machineId}\n`);
    assert.equal(read("hosts"), "127.0.0.1 localhost\n127.0.1.1 sbaaa\n");
    assert.deepEqual(await (await envd.fetch("/envs")).json(), { FROM_INIT: "yes" });
    const wrong = await envd.fetch("/envs", { headers: { "x-access-token": `${ACCESS_TOKEN}x` } });
    assert.equal(wrong.status, 401);
  });

  test("the same restore again is a 204 that changes nothing; a new one takes over; an old one is a 409", async () => {
    const first = initBody({ accessToken: "first" });
    assert.equal((await envd.init(first)).status, 204);
    assert.equal((await envd.init({ ...first, accessToken: "changed" })).status, 204);
    const envs = (token: string) => envd.fetch("/envs", { headers: { "x-access-token": token } });
    assert.equal((await envs("first")).status, 200);
    assert.equal((await envs("changed")).status, 401);

    assert.equal((await envd.init(initBody({ accessToken: "second" }))).status, 204);
    assert.equal((await envs("first")).status, 401);
    assert.equal((await envs("second")).status, 200);

    assert.equal((await envd.init(first)).status, 409);
    assert.equal((await envs("second")).status, 200);
  });

  test("a restore whose init failed may be tried again", async () => {
    const body = initBody({ defaultUser: "no-such-user", accessToken: "third" });
    assert.equal((await envd.init(body)).status, 500);
    assert.equal((await envd.init({ ...body, defaultUser: "root" })).status, 204);
  });

  test("a body beyond the bound is a 413", async () => {
    const answer = await envd.init(initBody({ envVars: Object.fromEntries(manyVariables()) }));
    assert.equal(answer.status, 413);
  });
});

test("init from any address but the host's is a 401", async () => {
  await using envd = await EnvdProcess.start({ hostAddress: "169.254.0.22" });
  const answer = await envd.init();
  assert.equal(answer.status, 401);
  assert.deepEqual(await answer.json(), { code: 401, message: "init is for the host alone" });
});

function manyVariables(): [string, string][] {
  return Array.from({ length: 20 }, (_, index) => [`V${index}`, "x".repeat(100_000)]);
}
