/** What an operator does to a host, over HTTP. */
import { afterAll, beforeAll, expect, test, vi } from "vitest";
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

const newHost = async (type: "byoc" | "shared" = "byoc"): Promise<string> => {
  const made = await api.call("POST", "/v1/hosts", { name: "one", type, labels: { zone: "a" } }, platform);
  return `/v1/hosts/${made.body.host.id}`;
};
const mine = async (): Promise<string> => {
  const made = await api.call("POST", "/v1/hosts", { name: "one", type: "byoc", labels: { zone: "a" } });
  return `/v1/hosts/${made.body.host.id}`;
};

test("its name and labels change; labels are replaced whole, and what is not named stays", async () => {
  const at = await mine();
  expect((await api.call("PATCH", at, { labels: { rack: "7" } })).body).toMatchObject({
    name: "one",
    labels: { rack: "7" },
  });
  expect((await api.call("PATCH", at, { name: "two" })).body).toMatchObject({
    name: "two",
    labels: { rack: "7" },
  });
  expect((await api.call("PATCH", at, {})).body.name).toBe("two");
});

test.each<[unknown, string]>([
  [{ name: "" }, "name"],
  [{ name: "a\u0000b" }, "name"],
  [{ name: 7 }, "name"],
  [{ labels: { a: 1 } }, "labels.a"],
  [{ labels: [] }, "labels"],
  [{ labels: Object.fromEntries(Array.from({ length: 65 }, (_, i) => [`k${i}`, ""])) }, "labels"],
  [{ status: "online" }, "status"],
  [{ draining: true }, "draining"],
])("a change to %j is refused by its field", async (body, field) => {
  const answer = await api.call("PATCH", await mine(), body);
  expect([answer.status, answer.body.error.code]).toEqual([400, "invalid_request"]);
  expect(answer.body.error.details.field).toBe(field);
});

test("it drains and takes sandboxes again, is revoked, and says so", async () => {
  const at = await mine();
  expect((await api.call("POST", `${at}/drain`)).body.status).toBe("draining");
  expect((await api.call("POST", `${at}/undrain`, {})).body.status).toBe("online");
  const revoked = await api.call("POST", `${at}/revoke`);
  expect(revoked.body).toMatchObject({ status: "unreachable", revoked_at: expect.any(String) });
  for (const action of ["drain", "undrain", "revoke"]) {
    expect((await api.call("POST", `${at}/${action}`, { now: true })).body.error.details.field).toBe("now");
  }
});

test("a deletion that would end sandboxes is 409 with their list, is previewed, and done by force", async () => {
  const at = await mine();
  const { id } = (await api.call("POST", "/v1/sandboxes", {})).body;
  const preview = await api.call("GET", `${at}/delete-preview`);
  expect(preview.body).toMatchObject({
    sandboxes: [{ id, status: "running" }],
    sandbox_count: 1,
    snapshots: [],
    snapshot_count: 0,
  });
  for (const query of ["", "?force=false"]) {
    const refused = await api.call("DELETE", `${at}${query}`);
    expect([refused.status, refused.body.error.code]).toEqual([409, "host_has_sandboxes"]);
    expect(refused.body.error.details.sandboxes).toMatchObject([{ id }]);
  }
  expect((await api.call("DELETE", `${at}?force=true`)).status).toBe(204);
  expect((await api.call("GET", at)).status).toBe(404);
  expect((await api.call("DELETE", `${at}?force=true`)).status).toBe(404);
});

test.each(["?force=1", "?force=yes", "?force=", "?force=true&force=true", "?all=true"])(
  "%s forces nothing: it is refused",
  async (query) => {
    const at = await mine();
    const answer = await api.call("DELETE", `${at}${query}`);
    expect([answer.status, answer.body.error.code]).toEqual([400, "invalid_request"]);
    expect((await api.call("GET", at)).status).toBe(200);
  },
);

test("another team's host, a shared one and a malformed id are not there; a platform key has them all", async () => {
  for (const at of [await newHost(), await newHost("shared"), "/v1/hosts/host-nope", "/v1/hosts/%2e%2e"]) {
    for (const [method, path, body] of [
      ["PATCH", at, { name: "x" }],
      ["POST", `${at}/drain`, undefined],
      ["POST", `${at}/undrain`, undefined],
      ["POST", `${at}/revoke`, undefined],
      ["GET", `${at}/delete-preview`, undefined],
      ["DELETE", `${at}?force=true`, undefined],
    ] as const) {
      const answer = await api.call(method, path, body);
      expect([path, answer.status, answer.body.error.code]).toEqual([path, 404, "not_found"]);
    }
  }
  const at = await mine();
  expect((await api.call("PATCH", at, { name: "x" }, platform)).status).toBe(200);
  expect((await api.call("POST", `${at}/drain`, undefined, platform)).status).toBe(200);
  expect((await api.call("DELETE", `${at}?force=true`, undefined, platform)).status).toBe(204);
});
