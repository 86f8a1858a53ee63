/** Who may call what, how often, and what the answers and the log tell of it. */
import { ERRORS, RookeryError } from "@rookery/protocol/errors";
import type { ErrorCode } from "@rookery/protocol/errors";
import { Registry } from "prom-client";
import { pino } from "pino";
import { afterAll, beforeAll, describe, expect, test, vi } from "vitest";
import { buildApi } from "./app.ts";
import { FakeServices } from "./testing/fake-services.ts";
import { openTestApi } from "./testing/test-api.ts";
import type { TestApi } from "./testing/test-api.ts";

// Machines that run every suite at once are slow.
vi.setConfig({ testTimeout: 60_000 });

let api: TestApi;
let platform: Record<string, string>;
beforeAll(async () => {
  api = await openTestApi();
  platform = { "x-api-key": api.services.keys.platform };
});
afterAll(() => api[Symbol.asyncDispose]());

describe("keys", () => {
  test("a key is taken from either header, in either spelling", async () => {
    const key = api.services.keys.member;
    const spelled = key.replace("rk_", "e2b_");
    for (const headers of [
      { "x-api-key": key },
      { "x-api-key": spelled },
      { authorization: `Bearer ${key}` },
      { authorization: `bearer  ${spelled}` },
    ]) {
      const response = await api.app.inject({ url: "/v1/sandboxes", headers });
      expect(response.statusCode).toBe(200);
    }
  });

  test.each<[string, Record<string, string>]>([
    ["none", {}],
    ["an empty one", { "x-api-key": "" }],
    ["an unknown one", { "x-api-key": `rk_${"0".repeat(40)}` }],
    ["nonsense", { authorization: "Basic dXNlcjpwdw==" }],
    ["two in one", { authorization: "Bearer a b" }],
    ["an endless one", { "x-api-key": "rk_".padEnd(8000, "0") }],
  ])("%s is 401 everywhere, before the body is looked at", async (_what, headers) => {
    for (const [method, url] of [
      ["GET", "/v1/sandboxes"],
      ["POST", "/v1/sandboxes"],
      ["POST", "/v1/sandboxes/x/exec"],
      ["POST", "/v1/sandboxes/x/files/write"],
      ["GET", "/v1/teams"],
      ["DELETE", "/v1/api-keys/x"],
    ] as const) {
      const response = await api.app.inject({
        method,
        url,
        headers,
        ...(method === "POST" ? { payload: "{" } : {}),
      });
      expect([url, response.statusCode]).toEqual([url, 401]);
      expect(response.json().error.code).toBe("unauthenticated");
      expect(response.headers["www-authenticate"]).toBe('Bearer realm="rookery"');
    }
  });

  test("every route but the public ones asks for something", async () => {
    const document = (await api.call("GET", "/openapi.json")).body;
    const open = Object.entries<Record<string, { security: object[]; tags: string[] }>>(
      document.paths,
    ).flatMap(([path, operations]) =>
      Object.values(operations).some(({ security }) => security.length === 0) ? [path] : [],
    );
    expect(open.toSorted()).toEqual([
      "/healthz",
      "/metrics",
      "/readyz",
      "/v1/hosts/auth/refresh",
      "/v1/hosts/register",
    ]);
  });

  test("a member's key is 403 for what needs a platform's, and can't make one", async () => {
    for (const [method, url, body] of [
      ["GET", "/v1/teams", undefined],
      ["POST", "/v1/teams", { name: "x" }],
      ["POST", "/v1/hosts", { name: "h", type: "shared" }],
      ["POST", "/v1/api-keys", { name: "x", role: "platform" }],
    ] as const) {
      const answer = await api.call(method, url, body);
      expect([url, answer.status, answer.body.error.code]).toEqual([url, 403, "forbidden"]);
    }
  });

  test("a key is made, used, listed without itself, and gone when deleted", async () => {
    const made = await api.call("POST", "/v1/api-keys", { name: "ci" });
    expect(made.status).toBe(201);
    expect(made.body.api_key).toMatchObject({
      name: "ci",
      role: "member",
      prefix: made.body.key.slice(0, 8),
    });
    const mine = { "x-api-key": made.body.key };
    expect((await api.call("GET", "/v1/sandboxes", undefined, mine)).status).toBe(200);
    const list = await api.call("GET", "/v1/api-keys");
    expect(JSON.stringify(list.body)).not.toContain(made.body.key);
    expect(
      (await api.call("DELETE", `/v1/api-keys/${made.body.api_key.id}`, undefined, platform)).status,
    ).toBe(404);
    expect((await api.call("DELETE", `/v1/api-keys/${made.body.api_key.id}`)).status).toBe(204);
    expect((await api.call("GET", "/v1/sandboxes", undefined, mine)).status).toBe(401);
  });

  test("a team is made with its first key", async () => {
    const made = await api.call("POST", "/v1/teams", { name: "new" }, platform);
    expect(made.body).toMatchObject({
      team: { name: "new" },
      api_key: { team_id: made.body.team.id, role: "member" },
    });
    const teams = await api.call("GET", "/v1/teams", undefined, platform);
    expect(teams.body.items[0].id).toBe(made.body.team.id);
  });
});

describe("snapshots and templates", () => {
  test("a snapshot is made, found among the templates, and deleted", async () => {
    const id = (await api.call("POST", "/v1/sandboxes", {})).body.id;
    const make = (body: object) =>
      api.call("POST", "/v1/snapshots", { sandbox_id: id, name: "v1.0", ...body });
    expect((await make({})).body).toMatchObject({ name: "v1.0", vcpus: 1, memory_mb: 512 });
    expect((await make({})).body.error.code).toBe("already_exists");
    expect((await make({ overwrite: true })).status).toBe(201);
    expect((await api.call("GET", "/v1/snapshots")).body.items).toHaveLength(1);
    expect((await api.call("GET", "/v1/templates")).body.items).toMatchObject([
      { name: "v1.0", kind: "snapshot" },
    ]);
    expect((await api.call("DELETE", "/v1/snapshots/v1.0")).status).toBe(204);
    expect((await api.call("DELETE", "/v1/snapshots/v1.0")).status).toBe(404);
    expect((await api.call("DELETE", "/v1/snapshots/%2e%2e")).status).toBe(404);
  });
});

describe("hosts and their agents", () => {
  const facts = {
    address: "http://127.0.0.1:7071",
    public_key: "MCowBQYDK2VwAyEA",
    arch: "x64",
    cpus: 2,
    memory_mb: 4096,
    disk_mb: 10_000,
    drivers: { vmm: "qemu" },
    version: "0.1.0",
  };
  const beat = {
    load: { cpus: 0.5, memory_mb_used: 100, disk_mb_free: 100, sandboxes: 0 },
    digest: "abc",
    event_log_id: "log",
    last_event_number: 7,
  };

  test("a host is made, registers by its token, beats, and renews its tokens", async () => {
    const made = await api.call("POST", "/v1/hosts", { name: "one", type: "byoc", labels: { zone: "a" } });
    expect(made.status).toBe(201);
    expect(made.body.host).toMatchObject({
      name: "one",
      status: "pending",
      labels: { zone: "a" },
      sandboxes: 0,
    });
    const again = await api.call("POST", `/v1/hosts/${made.body.host.id}/token`);
    const registered = await api.call("POST", "/v1/hosts/register", {
      token: again.body.registration_token,
      ...facts,
      of_a_newer_agent: true,
    });
    expect(registered.status).toBe(200);
    expect(registered.body.host_id).toBe(made.body.host.id);
    const at = `/v1/hosts/${made.body.host.id}`;
    const bearer = { authorization: `Bearer ${registered.body.access_token}` };
    const beaten = await api.call("POST", `${at}/heartbeat`, { ...beat, of_a_newer_agent: 1 }, bearer);
    expect(beaten.body).toEqual({ acknowledged_event: 7 });
    const renewed = await api.call("POST", "/v1/hosts/auth/refresh", {
      refresh_token: registered.body.refresh_token,
    });
    expect(renewed.status).toBe(200);
    expect((await api.call("GET", at)).body).toMatchObject({
      status: "online",
      cpus: 2,
      drivers: { vmm: "qemu" },
    });
    expect((await api.call("GET", "/v1/hosts", undefined, platform)).body.items).toHaveLength(1);
  });

  test("what proves nothing is 401 invalid_token, never 400", async () => {
    const id = (await api.call("POST", "/v1/hosts", { name: "two", type: "byoc" })).body.host.id;
    for (const [url, body] of [
      ["/v1/hosts/register", { token: "nope", ...facts }],
      ["/v1/hosts/auth/refresh", { refresh_token: "nope" }],
      [`/v1/hosts/${id}/heartbeat`, beat],
    ] as const) {
      const answer = await api.call("POST", url, body, { authorization: "Bearer nope" });
      expect([url, answer.status, answer.body.error.code]).toEqual([url, 401, "invalid_token"]);
      expect(answer.headers["www-authenticate"]).toMatch(/error="invalid_token"/);
    }
    const bare = await api.app.inject({ method: "POST", url: `/v1/hosts/${id}/heartbeat`, payload: beat });
    expect([bare.statusCode, bare.json().error.code]).toEqual([401, "invalid_token"]);
  });

  test("what an agent sends is held to its bounds all the same", async () => {
    const answer = await api.call("POST", "/v1/hosts/register", {
      token: "t",
      ...facts,
      cpus: 0,
      drivers: { a: 1 },
    });
    expect(answer.body.error.details.violations).toMatchObject([{ field: "cpus" }, { field: "drivers.a" }]);
  });
});

describe("rate limits", () => {
  test("a key that calls too often is told when to come back; others, and agents, are not held up", async () => {
    await using limited = await openTestApi({ limits: { requestsPerMinute: 3 } });
    for (let i = 0; i < 3; i += 1) expect((await limited.call("GET", "/v1/sandboxes")).status).toBe(200);
    const refused = await limited.call("GET", "/v1/sandboxes");
    expect([refused.status, refused.body.error.code]).toEqual([429, "rate_limited"]);
    expect(Number(refused.headers["retry-after"])).toBeGreaterThan(0);
    const other = { "x-api-key": limited.services.keys.platform };
    expect((await limited.call("GET", "/v1/sandboxes", undefined, other)).status).toBe(200);
    for (let i = 0; i < 10; i += 1) {
      expect((await limited.call("POST", "/v1/hosts/auth/refresh", { refresh_token: "x" })).status).toBe(401);
      expect((await limited.call("GET", "/healthz")).status).toBe(200);
    }
  });
});

describe("failures", () => {
  test.each(Object.keys(ERRORS) as ErrorCode[])(
    "a service's %s becomes its status and keeps its details",
    async (code) => {
      const spy = vi
        .spyOn(api.services, "listHosts")
        .mockRejectedValue(
          new RookeryError(code, "for people", { details: { status: "x" }, cause: new Error("for us") }),
        );
      const response = await api.app.inject({ url: "/v1/hosts", headers: platform });
      spy.mockRestore();
      expect(response.statusCode).toBe(ERRORS[code].status);
      expect(response.json()).toEqual({ error: { code, message: "for people", details: { status: "x" } } });
      if (code === "rate_limited") expect(response.headers["retry-after"]).toBe("1");
      if (response.statusCode === 503) expect(response.headers["retry-after"]).toBeDefined();
    },
  );

  test("a bug is 500 without a word of it, and its log line names the request", async () => {
    api.log.length = 0;
    const spy = vi.spyOn(api.services, "listHosts").mockRejectedValue(new Error("secret: /srv/db at line 5"));
    const answer = await api.call("GET", "/v1/hosts");
    spy.mockRestore();
    expect([answer.status, answer.body.error.code]).toEqual([500, "internal"]);
    expect(answer.raw.toString()).not.toMatch(/secret|srv|stack|at line/);
    const line = api.log.find(({ level }) => level === 50);
    expect(line).toMatchObject({ request: answer.headers["x-request-id"], err: { message: /secret/ } });
  });

  test("what is thrown and no error is a bug too", async () => {
    for (const thrown of [
      "text",
      undefined,
      null,
      { code: "not_found" },
      new TypeError("x"),
      { statusCode: 200 },
    ]) {
      const spy = vi.spyOn(api.services, "listHosts").mockImplementation(async () => {
        throw thrown;
      });
      const answer = await api.call("GET", "/v1/hosts");
      spy.mockRestore();
      expect([thrown, answer.status]).toEqual([thrown, 500]);
    }
  });
});

describe("operations", () => {
  test("alive is not ready", async () => {
    expect((await api.call("GET", "/readyz")).status).toBe(200);
    api.services.isReady = false;
    const answer = await api.call("GET", "/readyz");
    expect([answer.status, answer.body.error.code]).toEqual([503, "unavailable"]);
    expect((await api.call("GET", "/healthz")).status).toBe(200);
    api.services.isReady = true;
  });

  test("figures know routes by template, are kept with others', and are shown on loopback only", async () => {
    const registry = new Registry();
    const app = await buildApi(new FakeServices(), {
      logger: pino({ level: "silent" }),
      version: "0",
      metrics: registry,
    });
    await app.inject("/v1/sandboxes/sbaaaaaaaaaaaaaaaaaa");
    await app.inject("/v1/nothing/sbaaaaaaaaaaaaaaaaaa");
    const { statusCode, body, headers } = await app.inject("/metrics");
    expect(statusCode).toBe(200);
    expect(headers["content-type"]).toMatch(/^text\/plain/);
    expect(body).toMatch(
      /duration_seconds_count\{method="GET",route="\/v1\/sandboxes\/:id",status="401"\} 1/,
    );
    expect(body).toMatch(/duration_seconds_count\{method="any",route="unknown",status="404"\} 1/);
    expect(body).toMatch(/^process_cpu_seconds_total/m);
    expect(body).not.toContain("sbaaaa");
    for (const from of [
      { remoteAddress: "10.0.0.7" },
      { remoteAddress: "127.0.0.1", headers: { "x-forwarded-for": "10.0.0.7" } },
    ]) {
      expect((await app.inject({ url: "/metrics", ...from })).statusCode).toBe(403);
    }
    await app.close();
  });

  test("the log has one line a request, and neither keys nor bodies nor queries", async () => {
    api.log.length = 0;
    const id = (await api.call("POST", "/v1/sandboxes", { env: { TOKEN: "hush-1" } })).body.id;
    await api.call("POST", `/v1/sandboxes/${id}/exec`, { cmd: "echo hush-2" });
    await api.call("GET", "/v1/sandboxes?metadata.secret=hush-3");
    await api.call("GET", "/v1/sandboxes?metadata.secret=%zz-hush-4");
    const text = JSON.stringify(api.log);
    expect(text).not.toMatch(/hush|rk_/);
    const lines = api.log.filter(({ msg }) => msg === "request");
    expect(lines).toHaveLength(4);
    expect(lines[1]).toMatchObject({
      method: "POST",
      route: "/v1/sandboxes/:id/exec",
      params: { id },
      status: 200,
    });
  });

  test("every answer forbids what it need not allow", async () => {
    for (const url of ["/v1/sandboxes", "/docs", "/test", "/v1/nothing"]) {
      const { headers } = await api.app.inject({ url, headers: platform });
      expect(headers["content-security-policy"]).toMatch(/default-src 'none';script-src 'self'/);
      expect(headers["x-frame-options"]).toBeDefined();
      expect(headers["x-powered-by"]).toBeUndefined();
      expect(headers.server).toBeUndefined();
    }
    expect((await api.call("GET", "/v1/sandboxes")).headers["cache-control"]).toBe("no-store");
  });
});

describe("pages", () => {
  test.each(["/docs", "/test"])(
    "%s and all that it names are served from here, with no inline script",
    async (url) => {
      const page = await api.app.inject(url);
      expect(page.statusCode).toBe(200);
      expect(page.headers["content-type"]).toMatch(/^text\/html/);
      expect(page.body).not.toMatch(/<script>|<script(?![^>]* src=)|\son[a-z]+=|style=|https?:\/\//);
      const named = [...page.body.matchAll(/(?:src|href)="(\/[^"]+)"/g)].map(([, path]) => path ?? "");
      expect(named.length).toBeGreaterThan(1);
      for (const path of named) {
        const response = await api.app.inject(path);
        expect([path, response.statusCode]).toEqual([path, 200]);
      }
    },
  );

  test("nothing else of those directories is served", async () => {
    for (const url of [
      "/docs/package.json",
      "/docs/..%2fpackage.json",
      "/test/docs.js",
      "/docs/swagger-ui.js",
    ]) {
      expect([url, (await api.app.inject(url)).statusCode]).toEqual([url, 404]);
    }
  });

  test("the front door says where to go", async () => {
    expect((await api.call("GET", "/")).body).toMatchObject({
      name: "rookery",
      docs: "/docs",
      console: "/test",
    });
  });
});
