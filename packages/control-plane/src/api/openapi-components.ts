/**
 * Tidies the document's named schemas.
 *
 * The type provider emits each one twice, as callers send it (`FooInput`) and as
 * we answer it (`Foo`), whichever is used. Here the unused ones go, and a lone
 * `FooInput` gets its plain name, which is what clients generate types from.
 */
import { z } from "zod";

type Json = Record<string, unknown>;

const REFERENCE = "#/components/schemas/";
const INPUT = /Input$/;

export function tidyComponents<T extends object>(document: T): T {
  const { components } = document as { components?: { schemas?: Record<string, unknown> } };
  const schemas = components?.schemas ?? {};
  const used = reachable({ ...document, components: undefined }, schemas);
  const names = new Map(
    [...used].map((name) => {
      const plain = name.replace(INPUT, "");
      return [name, used.has(plain) ? name : plain];
    }),
  );
  const kept = Object.fromEntries([...names].map(([name, plain]) => [plain, schemas[name]]));
  return renamed({ ...document, components: { ...components, schemas: kept } }, names);
}

function reachable(root: unknown, schemas: Json): Set<string> {
  const used = new Set<string>();
  const open: unknown[] = [root];
  while (open.length > 0) {
    JSON.stringify(open.pop(), (key, value: unknown) => {
      const name = nameOf(key, value);
      if (name !== undefined && !used.has(name)) {
        used.add(name);
        open.push(schemas[name]);
      }
      return value;
    });
  }
  return used;
}

function renamed<T>(document: T, names: ReadonlyMap<string, string>): T {
  return JSON.parse(JSON.stringify(document), (key, value: unknown) => {
    const name = nameOf(key, value);
    return name === undefined ? value : REFERENCE + (names.get(name) ?? name);
  });
}

function nameOf(key: string, value: unknown): string | undefined {
  return key === "$ref" && typeof value === "string" ? value.slice(REFERENCE.length) : undefined;
}

/** Of one schema: what zod says needlessly, or can't say. */
export function polishSchema({
  zodSchema,
  jsonSchema,
  io,
}: {
  zodSchema: z.core.$ZodType;
  jsonSchema: z.core.JSONSchema.BaseSchema;
  io?: "input" | "output";
}): void {
  // The bounds of every safe integer are no limit of ours.
  if (jsonSchema.minimum === Number.MIN_SAFE_INTEGER) delete jsonSchema.minimum;
  if (jsonSchema.maximum === Number.MAX_SAFE_INTEGER) delete jsonSchema.maximum;
  if (jsonSchema.format === "date-time") delete jsonSchema.pattern;
  if (jsonSchema.enum?.every(Number.isInteger) === true) jsonSchema.type = "integer";
  // @fastify/swagger leaves the content away for this type.
  if (zodSchema instanceof z.ZodUndefined && io !== "input") jsonSchema.type = "null";
}
