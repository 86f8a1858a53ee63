import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { openTestApi } from "./testing/test-api.ts";
import type { TestApi } from "./testing/test-api.ts";

let api: TestApi;
beforeAll(async () => {
  api = await openTestApi();
});
afterAll(() => api[Symbol.asyncDispose]());

const create = async (body: object = {}) => (await api.call("POST", "/v1/sandboxes", body)).body;

describe("sandboxes", () => {
  test("a sandbox is made with the defaults of the contract", async () => {
    const { status, body } = await api.call("POST", "/v1/sandboxes", {});
    expect(status).toBe(201);
    expect(body).toMatchObject({
      status: "running",
      template: "base",
      vcpus: 1,
      memory_mb: 512,
      disk_mb: 4096,
      timeout_sec: 300,
      on_timeout: "pause",
      timeout_mode: "idle",
      env: {},
      metadata: {},
    });
    expect(body).not.toHaveProperty("generation");
    expect(body).not.toHaveProperty("team_id");
  });

  test("its whole life: pause, resume, ping, change, destroy, destroy again", async () => {
    const { id } = await create({ metadata: { a: "1" } });
    const at = `/v1/sandboxes/${id}`;
    expect((await api.call("POST", `${at}/pause`)).body.status).toBe("paused");
    expect((await api.call("POST", `${at}/ping`)).status).toBe(409);
    expect((await api.call("POST", `${at}/resume`, {})).body.status).toBe("running");
    expect((await api.call("POST", `${at}/ping`)).status).toBe(204);
    const changed = await api.call("PATCH", at, {
      timeout_sec: 0,
      on_timeout: "destroy",
      metadata: { b: "2" },
    });
    expect(changed.body).toMatchObject({
      timeout_sec: 0,
      on_timeout: "destroy",
      timeout_mode: "idle",
      metadata: { b: "2" },
    });
    expect((await api.call("DELETE", at)).status).toBe(204);
    expect((await api.call("DELETE", at)).status).toBe(204);
    const ended = (await api.call("GET", at)).body;
    expect(ended.status).toBe("stopped");
    expect(ended.ended_at).toMatch(/Z$/);
  });

  test("a wrong state is 409 and says which one it is", async () => {
    const { id } = await create();
    const { status, body } = await api.call("POST", `/v1/sandboxes/${id}/resume`);
    expect(status).toBe(409);
    expect(body.error).toMatchObject({ code: "wrong_state", details: { status: "running" } });
  });

  test("another team's sandbox is not there, and neither is a malformed id", async () => {
    const { id } = await create();
    const platform = { "x-api-key": api.services.keys.platform };
    for (const [method, path] of [
      ["GET", ""],
      ["DELETE", ""],
      ["PATCH", ""],
      ["POST", "/pause"],
      ["POST", "/exec"],
      ["POST", "/files/read"],
    ] as const) {
      const bodies: Record<string, object> = { "/exec": { cmd: "id" }, "/files/read": { path: "x" } };
      const body = bodies[path] ?? (method === "PATCH" ? {} : undefined);
      expect((await api.call(method, `/v1/sandboxes/${id}${path}`, body, platform)).status).toBe(404);
      for (const bad of [
        "x",
        "sb",
        "%00",
        "..%2f",
        `${id}0`,
        "sb".padEnd(400, "a"),
        encodeURIComponent("sbÜ💥"),
      ]) {
        const answer = await api.call(method, `/v1/sandboxes/${bad}${path}`, body);
        expect([bad, answer.status, answer.body.error.code]).toEqual([bad, 404, "not_found"]);
      }
    }
  });

  test("lists go by pages, newest first, without environments", async () => {
    const marks = { batch: "pages" };
    const ids: string[] = [];
    for (let i = 0; i < 5; i += 1) ids.unshift((await create({ metadata: marks, env: { A: "1" } })).id);
    const seen: string[] = [];
    let cursor = "";
    do {
      const url = `/v1/sandboxes?metadata.batch=pages&limit=2${cursor && `&cursor=${cursor}`}`;
      const { body } = await api.call("GET", url);
      for (const item of body.items) {
        expect(item.env).toBeUndefined();
        seen.push(item.id);
      }
      cursor = body.next_cursor ?? "";
    } while (cursor !== "");
    expect(seen).toEqual(ids);
  });

  test("lists are filtered by several statuses and by any metadata key", async () => {
    const odd = { "a.b=c&d": "x y/ü", KEY: "1" };
    const { id } = await create({ metadata: odd });
    await api.call("DELETE", `/v1/sandboxes/${id}`);
    const key = encodeURIComponent("metadata.a.b=c&d");
    const url = `/v1/sandboxes?status=running,stopped&${key}=${encodeURIComponent("x y/ü")}&metadata.KEY=1`;
    expect((await api.call("GET", url)).body.items).toMatchObject([{ id }]);
    expect((await api.call("GET", url.replace("running,stopped", "running"))).body.items).toEqual([]);
  });
});

describe("idempotency", () => {
  const once = (key: string, body: object) =>
    api.call("POST", "/v1/sandboxes", body, { "idempotency-key": key });

  test("the same key and meaning get the same sandbox, also at once, and another body a 409", async () => {
    const answers = await Promise.all([
      once("k1", { vcpus: 2, metadata: { a: "1", b: "2" } }),
      once("k1", { metadata: { b: "2", a: "1" }, vcpus: 2 }),
      once("k1", { vcpus: 2, metadata: { a: "1", b: "2" }, timeout_sec: 300 }),
    ]);
    expect(new Set(answers.map(({ body }) => body.id)).size).toBe(1);
    expect(answers.map(({ status }) => status)).toEqual([201, 201, 201]);
    const other = await once("k1", { vcpus: 4 });
    expect(other.status).toBe(409);
    expect(other.body.error.code).toBe("idempotency_mismatch");
  });

  test("a key that is no key is refused", async () => {
    for (const key of ["", "x".repeat(256), "käse"]) {
      const { status, body } = await once(key, {});
      expect([key, status]).toEqual([key, 400]);
      expect(body.error.details.field).toBe("Idempotency-Key");
    }
    expect((await once("x".repeat(255), {})).status).toBe(201);
  });

  test("it holds for all that is made, secrets included: a lost answer comes again", async () => {
    for (const [url, body] of [
      ["/v1/api-keys", { name: "ci" }],
      ["/v1/hosts", { name: "h", type: "byoc" }],
      ["/v1/teams", { name: "t" }],
    ] as const) {
      const headers = { "idempotency-key": `k${url}`, "x-api-key": api.services.keys.platform };
      const first = await api.call("POST", url, body, headers);
      const again = await api.call("POST", url, body, headers);
      expect([first.status, again.status, again.body]).toEqual([201, 201, first.body]);
    }
  });
});
