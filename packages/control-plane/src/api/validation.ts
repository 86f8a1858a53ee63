/** Schemas at work: zod for every part of a request, and what a breach becomes. */
import { RookeryError } from "@rookery/protocol/errors";
import type { FastifySchemaCompiler, FastifySchema } from "fastify";
import { z } from "zod";
import { invalidField, invalidRequest, violationsOf } from "./violations.ts";

const PLACES: Readonly<Record<string, string>> = { body: "body", querystring: "query", params: "path" };

/** A breach in the path is an unknown thing: a malformed id is answered like one that is not there. */
export const compileValidator: FastifySchemaCompiler<FastifySchema> = ({ schema, httpPart }) => {
  if (!(schema instanceof z.ZodType)) throw new TypeError(`the ${httpPart} schema is not zod's`);
  return (data: unknown) => {
    // Zod passes over this one key, even where it takes no unknown ones.
    if (typeof data === "object" && data !== null && Object.hasOwn(data, "__proto__")) {
      return { error: invalidField("__proto__", "is not a field of this request") };
    }
    const result = schema.safeParse(data);
    if (result.success) return { value: result.data };
    if (httpPart === "params")
      return { error: new RookeryError("not_found", "there is nothing by this id or name") };
    return { error: invalidRequest(violationsOf(result.error, data), PLACES[httpPart ?? ""] ?? "request") };
  };
};

/**
 * Answers are shaped by the render functions, whose results the compiler checks
 * against the schemas' types, and tests check against the document itself.
 */
export const compileSerializer = () => (data: unknown) => JSON.stringify(data);
