/**
 * The API over fake services, and a caller that believes no answer: each one is
 * checked against the served document, by a validator that is not the API's own.
 */
import { Ajv2020 } from "ajv/dist/2020.js";
import type { ValidateFunction } from "ajv/dist/2020.js";
import type { InjectOptions, LightMyRequestResponse } from "fastify";
import assert from "node:assert/strict";
import { pino } from "pino";
import type { Logger } from "pino";
import { buildApi } from "../app.ts";
import type { Api, ApiOptions } from "../app.ts";
import { FakeServices } from "./fake-services.ts";

type Json = any; // oxlint-disable-line typescript/no-explicit-any -- answers are looked into by tests

export interface Answer {
  status: number;
  headers: LightMyRequestResponse["headers"];
  body: Json;
  raw: Buffer;
}

export interface TestApi extends AsyncDisposable {
  app: Api;
  services: FakeServices;
  /** As team b's member, unless the headers say otherwise. */
  call(
    method: InjectOptions["method"],
    url: string,
    body?: unknown,
    headers?: Record<string, string>,
  ): Promise<Answer>;
  /** An answer got in some other way, checked the same. */
  check(
    method: string,
    url: string,
    answer: { status: number; headers: Record<string, unknown>; raw: Buffer },
  ): Json;
  log: Json[];
}

export async function openTestApi(options: Partial<ApiOptions> = {}): Promise<TestApi> {
  const services = new FakeServices();
  const log: Json[] = [];
  const logger: Logger = pino(
    { level: "debug" },
    { write: (line: string) => void log.push(JSON.parse(line)) },
  );
  const app = await buildApi(services, { logger, version: "0.0.0-test", ...options });
  await app.ready();
  const check = answerChecker(app.swagger() as Json);
  return {
    app,
    services,
    log,
    check,
    async call(method, url, body, headers = {}) {
      const response = await app.inject({
        method,
        url,
        headers: { "x-api-key": services.keys.member, ...headers },
        ...(body === undefined ? {} : { payload: body as NonNullable<InjectOptions["payload"]> }),
      });
      const answer = { status: response.statusCode, headers: response.headers, raw: response.rawPayload };
      return { ...answer, body: check(String(method), url, answer) };
    },
    [Symbol.asyncDispose]: () => app.close(),
  };
}

function answerChecker(document: Json): TestApi["check"] {
  const ajv = new Ajv2020({ strict: false, allErrors: true, formats: { binary: true, "date-time": isTime } });
  ajv.addSchema(document, "document");
  const validators = new Map<string, ValidateFunction>();
  const validatorAt = (...pointer: string[]): ValidateFunction => {
    const path = pointer
      .map((part) => encodeURIComponent(part.replaceAll("~", "~0").replaceAll("/", "~1")))
      .join("/");
    const validator = validators.get(path) ?? ajv.compile({ $ref: `document#/${path}` });
    validators.set(path, validator);
    return validator;
  };

  return (method, url, { status, headers, raw }) => {
    assert.match(String(headers["x-request-id"]), /^[0-9a-f-]{36}$/, "every answer names its request");
    assert.equal(headers["x-content-type-options"], "nosniff");
    const type = typeOf(headers["content-type"]);
    if (method === "HEAD") return undefined;
    const body: Json = type === "application/json" ? JSON.parse(raw.toString()) : undefined;
    const path = Object.keys(document.paths).find((one) => matches(one, url.split("?")[0] ?? ""));
    const operation = path === undefined ? undefined : document.paths[path][method.toLowerCase()];
    if (status >= 400) {
      expectValid(validatorAt("components", "schemas", "Error"), body, url);
      if (path === undefined || operation === undefined) return body;
      // What no call of its own can help: a broken encoding, a body where none is read.
      const anywhere = ["invalid_request", "unsupported_media_type", "not_found", "unavailable"];
      const described: string = operation.responses[status]?.description ?? "";
      assert.ok(
        described.includes(`\`${body.error.code}\``) || anywhere.includes(body.error.code),
        `${method} ${path} answers ${status} ${body.error.code}, which its document doesn't say`,
      );
      return body;
    }
    if (path === undefined || operation === undefined) return body;
    assert.ok(
      operation.responses[status],
      `${method} ${path} answers ${status}, which its document doesn't say`,
    );
    if (status === 204) assert.equal(raw.length, 0);
    else if (type === "application/json") {
      expectValid(
        validatorAt(
          "paths",
          path,
          method.toLowerCase(),
          "responses",
          String(status),
          "content",
          type,
          "schema",
        ),
        body,
        url,
      );
    } else assert.ok(operation.responses[status].content[type], `${path} answers ${type}`);
    return body;
  };
}

function expectValid(validate: ValidateFunction, body: unknown, url: string): void {
  assert.ok(
    validate(body),
    `${url}: ${JSON.stringify(body).slice(0, 500)} breaks ${JSON.stringify(validate.errors)}`,
  );
}

function matches(template: string, path: string): boolean {
  return new RegExp(`^${template.replaceAll(/\{[^}]+\}/g, "[^/]+").replaceAll(".", "\\.")}$`).test(path);
}

function typeOf(header: unknown): string {
  return typeof header === "string" ? (header.split(";")[0] ?? "") : "";
}

function isTime(text: string): boolean {
  return /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/.test(text);
}
