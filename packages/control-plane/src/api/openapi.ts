/**
 * The document: made from the schemas that validate, plus what a route's
 * `config` implies, so that nobody writes down twice what a call may answer.
 */
import swagger from "@fastify/swagger";
import { ERRORS } from "@rookery/protocol/errors";
import type { ErrorCode } from "@rookery/protocol/errors";
import type { FastifyContextConfig, FastifySchema } from "fastify";
import { createJsonSchemaTransform, createJsonSchemaTransformObject } from "fastify-type-provider-zod";
import type { Api } from "./context.ts";
import { IDEMPOTENCY_HEADER } from "./idempotency.ts";
import { polishSchema, tidyComponents } from "./openapi-components.ts";
import { NoBody } from "./schemas/common.ts";
import { ErrorAnswer } from "./schemas/errors.ts";

const DESCRIPTION = `Code in microVM sandboxes on machines that you own.

Give an API key as \`X-API-Key\` or \`Authorization: Bearer\`. Every failure is
\`{"error":{"code","message","details?"}}\`; decide by \`code\`, never by \`message\`.`;

const zodToJsonConfig = { override: polishSchema };
const describeRoute = createJsonSchemaTransform({ zodToJsonConfig });
const addComponents = createJsonSchemaTransformObject({ zodToJsonConfig });

export async function describeApi(app: Api, version: string): Promise<void> {
  await app.register(swagger, {
    openapi: {
      openapi: "3.1.0",
      info: { title: "Rookery", version, description: DESCRIPTION, license: { name: "Apache-2.0" } },
      servers: [{ url: "/" }],
      tags: [
        "sandboxes",
        "events",
        "commands and files",
        "snapshots and templates",
        "teams and keys",
        "hosts",
        "agents",
        "operations",
      ].map((name) => ({ name })),
      components: {
        securitySchemes: {
          apiKey: { type: "apiKey", in: "header", name: "X-API-Key" },
          bearer: { type: "http", scheme: "bearer", description: "The API key." },
          hostToken: { type: "http", scheme: "bearer", description: "An agent's access token." },
        },
      },
    },
    transform: (document) => {
      const { schema, url } = describeRoute(document);
      const { route } = document;
      if (schema === undefined || document.schema?.hide === true) return { schema: { hide: true }, url };
      return { schema: complete(schema, document.schema, route.config ?? {}), url };
    },
    transformObject: (document) => tidyComponents(addComponents(document)),
  });
}

function complete(schemas: FastifySchema, given: FastifySchema, config: FastifyContextConfig): FastifySchema {
  const result: FastifySchema = { ...schemas, security: securityOf(config, given) };
  if (given.body === NoBody) delete result.body;
  if (config.rawBody !== undefined) {
    const types = Object.entries(config.rawBody).map(([type, schema]) => [type, { schema }]);
    result.body = { content: Object.fromEntries(types) };
  }
  if (config.isIdempotent === true) {
    result.headers = {
      type: "object",
      properties: {
        [IDEMPOTENCY_HEADER]: {
          type: "string",
          minLength: 1,
          maxLength: 255,
          description: "The same key and body get the same answer for 24 h; another body is 409.",
        },
      },
    };
  }
  const answers: Record<string, object> = Object.assign({}, schemas.response);
  const successes = Object.entries(answers).map(([status, schema]) => [
    status,
    { description: "Done.", ...schema },
  ]);
  result.response = { ...Object.fromEntries(successes), ...errorAnswers(codesOf(given, config)) };
  return result;
}

function securityOf({ access }: FastifyContextConfig, given: FastifySchema): Record<string, string[]>[] {
  if (access === "key" || access === "platform") return [{ apiKey: [] }, { bearer: [] }];
  return access === "agent" && given.params !== undefined ? [{ hostToken: [] }] : [];
}

function codesOf(given: FastifySchema, config: FastifyContextConfig): Set<ErrorCode> {
  const codes = new Set<ErrorCode>([...(config.errors ?? []), "internal"]);
  const add = (...more: ErrorCode[]): void => more.forEach((code) => codes.add(code));
  if (config.access !== "public") add("unavailable");
  if (config.access === "key" || config.access === "platform") add("unauthenticated", "rate_limited");
  if (config.access === "platform") add("forbidden");
  if (given.params !== undefined) add("not_found");
  if (given.body !== undefined || config.rawBody !== undefined) {
    add("invalid_request", "payload_too_large", "unsupported_media_type");
  }
  if (given.querystring !== undefined || config.isIdempotent === true) add("invalid_request");
  if (config.isIdempotent === true) add("idempotency_mismatch");
  return codes;
}

function errorAnswers(codes: ReadonlySet<ErrorCode>): Record<string, unknown> {
  const byStatus = Map.groupBy([...codes], (code) => ERRORS[code].status);
  return Object.fromEntries(
    [...byStatus].map(([status, names]) => [
      String(status),
      {
        description: names.map((name) => `\`${name}\``).join(", "),
        content: {
          "application/json": { schema: { $ref: `#/components/schemas/${ErrorAnswer.meta()?.id}` } },
        },
      },
    ]),
  );
}
