import { ERRORS } from "@rookery/protocol/errors";
import { afterAll, beforeAll, expect, test } from "vitest";
import { parse } from "yaml";
import { pino } from "pino";
import { buildApi } from "./app.ts";
import { FakeServices } from "./testing/fake-services.ts";
import { openTestApi } from "./testing/test-api.ts";
import type { TestApi } from "./testing/test-api.ts";

let api: TestApi;
// oxlint-disable-next-line typescript/no-explicit-any -- a document is looked into
let document: any;
beforeAll(async () => {
  api = await openTestApi();
  document = (await api.call("GET", "/openapi.json")).body;
});
afterAll(() => api[Symbol.asyncDispose]());

/** For browsers and for readers of the document itself. */
const PAGES = /^\/($|docs|test|openapi\.)/;

test("every route stands in the document, and nothing else does", async () => {
  const routes = new Set<string>();
  const app = await buildApi(new FakeServices(), { logger: pino({ level: "silent" }), version: "0" });
  const tree = app.printRoutes({ commonPrefix: false, includeMeta: false });
  expect(tree).toContain("sandboxes");
  app.addHook("onRoute", () => {
    throw new Error("routes were added late");
  });
  await app.ready();
  for (const [url, methods] of routesOf(tree)) {
    if (PAGES.test(url)) continue;
    for (const method of methods) {
      if (method !== "HEAD") routes.add(`${method.toLowerCase()} ${url.replaceAll(/:([a-z]+)/g, "{$1}")}`);
    }
  }
  await app.close();
  const documented = Object.entries<object>(document.paths).flatMap(([path, operations]) =>
    Object.keys(operations).map((method) => `${method} ${path}`),
  );
  expect(documented.toSorted()).toEqual([...routes].toSorted());
  expect(documented.length).toBeGreaterThan(25);
});

test("the document is OpenAPI 3.1 of this version, in JSON and in YAML", async () => {
  expect(document.openapi).toBe("3.1.0");
  expect(document.info.version).toBe("0.0.0-test");
  const yaml = await api.app.inject("/openapi.yaml");
  expect(yaml.headers["content-type"]).toMatch(/^application\/yaml/);
  expect(parse(yaml.body)).toEqual(document);
});

test("every error code is in the document", () => {
  expect(document.components.schemas.ErrorCode.enum.toSorted()).toEqual(Object.keys(ERRORS).toSorted());
});

test("every operation has an id, a tag, a summary, and says what failures it can answer", () => {
  const ids = new Set<string>();
  for (const operations of Object.values<object>(document.paths)) {
    for (const operation of Object.values(operations)) {
      expect(operation.operationId).toMatch(/^[a-z][A-Za-z]+$/);
      expect(ids.has(operation.operationId)).toBe(false);
      ids.add(operation.operationId);
      expect(operation.summary).toBeTruthy();
      expect(operation.tags).toHaveLength(1);
      expect(operation.responses[500].description).toContain("internal");
      const takesKey = operation.security.some((one: object) => "apiKey" in one);
      expect(Boolean(operation.responses[401])).toBe(takesKey || operation.tags[0] === "agents");
    }
  }
});

test("all references resolve", () => {
  const names = Object.keys(document.components.schemas);
  for (const [, name] of JSON.stringify(document).matchAll(/"#\/components\/schemas\/([^"]+)"/g)) {
    expect(names).toContain(name);
  }
});

test("bodies, headers and queries are described as they are", () => {
  const create = document.paths["/v1/sandboxes"].post;
  expect(create.parameters).toMatchObject([{ in: "header", name: "Idempotency-Key", required: false }]);
  expect(create.requestBody.content["application/json"].schema.$ref).toMatch(/CreateSandbox/);
  const write = document.paths["/v1/sandboxes/{id}/files/write"].post;
  expect(Object.keys(write.requestBody.content)).toEqual(["multipart/form-data", "application/octet-stream"]);
  const pause = document.paths["/v1/sandboxes/{id}/pause"].post;
  expect(pause.requestBody).toBeUndefined();
  const list = document.paths["/v1/sandboxes"].get.parameters;
  expect(list.map(({ name }: { name: string }) => name).toSorted()).toEqual([
    "cursor",
    "limit",
    "metadata.KEY",
    "status",
  ]);
  const shape = document.components.schemas.CreateSandboxInput ?? document.components.schemas.CreateSandbox;
  expect(shape.additionalProperties).toBe(false);
  expect(shape.properties.vcpus.enum).toEqual([1, 2, 4, 8]);
  expect(shape.properties.metadata).toMatchObject({ type: "object", maxProperties: 64 });
  expect(shape.required ?? []).toEqual([]);
});

function routesOf(tree: string): [string, string[]][] {
  const found: [string, string[]][] = [];
  const parents: string[] = [];
  for (const line of tree.split("\n")) {
    const [, indent = "", name = "", methods = ""] =
      /^([│ ]*)[├└]── (\S*) ?(?:\(([^)]*)\))?/.exec(line) ?? [];
    if (name === "" && methods === "") continue;
    const depth = indent.length / 4;
    parents.length = depth;
    parents.push(name);
    if (methods !== "") found.push([parents.join("").replace(/^\/\//, "/"), methods.split(", ")]);
  }
  return found;
}
