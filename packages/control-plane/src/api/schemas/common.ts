/**
 * The building blocks of every schema: text, maps of text, integers in a query.
 *
 * All text from outside is well-formed Unicode without NUL: PostgreSQL stores
 * neither, and a NUL ends a string for the guest's kernel. Limits count UTF-16
 * units, as JavaScript and JSON Schema's maxLength nearly do; where a kernel
 * limit is meant, they count UTF-8 bytes.
 */
import { z } from "zod";

export const MAX_MAP_ENTRIES = 64;
export const MAX_KEY_LENGTH = 128;
export const MAX_ENV_VALUE_LENGTH = 4096;
export const MAX_METADATA_VALUE_LENGTH = 512;
/** PATH_MAX of Linux, its final NUL included: the guest's kernel takes no longer one. */
export const MAX_PATH_BYTES = 4095;

/** Why a text is no good whatever its field, or nothing when it is. */
export function flawOfText(text: string): string | undefined {
  if (text.includes("\0")) return "must not contain NUL";
  return text.isWellFormed() ? undefined : "must be well-formed Unicode (it has a lone surrogate)";
}

export interface TextLimits {
  min?: number;
  max: number;
}

export function text({ min = 0, max }: TextLimits) {
  return z
    .string()
    .min(min)
    .max(max)
    .superRefine((value, context) => {
      const flaw = flawOfText(value);
      if (flaw !== undefined) context.addIssue({ code: "custom", message: flaw });
    });
}

/** Text bounded in UTF-8 bytes, for what ends up as one argument or path of a guest's system call. */
export function textOfBytes({ min = 0, max }: TextLimits) {
  return text({ min, max }).superRefine((value, context) => {
    if (Buffer.byteLength(value) > max) {
      context.addIssue({ code: "custom", message: `must be at most ${max} bytes of UTF-8` });
    }
  });
}

/** A name for people: any text without control characters. */
export function label(max: number) {
  return text({ min: 1, max })
    .refine((value) => !/\p{Cc}/u.test(value), "must not contain control characters")
    .meta({ minLength: 1, maxLength: max });
}

/** Absolute, or relative to the home of the sandbox's user. The guest resolves it. */
export const guestPath = textOfBytes({ min: 1, max: MAX_PATH_BYTES }).describe(
  "Absolute, or relative to the home of the sandbox's user.",
);

export interface TextMapLimits {
  maxValueLength: number;
  /** Why a key is no good, besides its length and NULs. */
  flawOfKey?: (key: string) => string | undefined;
}

/**
 * A map of text. Written by hand, because z.record() looks at every entry of a
 * map of 100,000 before any limit on their number could stop it.
 */
export function textMap({ maxValueLength, flawOfKey }: TextMapLimits) {
  return z
    .custom<Record<string, string>>(isPlainObject, "must be an object of strings")
    .superRefine((map, context) => {
      const keys = Object.keys(map);
      if (keys.length > MAX_MAP_ENTRIES) {
        context.addIssue({
          code: "custom",
          message: `must have at most ${MAX_MAP_ENTRIES} entries, but has ${keys.length}`,
        });
        return;
      }
      for (const key of keys) {
        const flaw = flawOfEntry(key, map[key], maxValueLength) ?? flawOfKey?.(key);
        if (flaw !== undefined) context.addIssue({ code: "custom", path: [key], message: flaw });
      }
    })
    .meta({
      type: "object",
      maxProperties: MAX_MAP_ENTRIES,
      propertyNames: { minLength: 1, maxLength: MAX_KEY_LENGTH },
      additionalProperties: { type: "string", maxLength: maxValueLength },
    });
}

function flawOfEntry(key: string, value: unknown, maxValueLength: number): string | undefined {
  if (key.length === 0) return "must not be an empty key";
  if (key === "__proto__") return "must be another key";
  if (key.length > MAX_KEY_LENGTH) return `must be a key of at most ${MAX_KEY_LENGTH} characters`;
  const flawOfKeyText = flawOfText(key);
  if (flawOfKeyText !== undefined) return `${flawOfKeyText}, in its key`;
  if (typeof value !== "string") return `must be a string, but is ${kindOf(value)}`;
  if (value.length > maxValueLength) return `must be at most ${maxValueLength} characters`;
  return flawOfText(value);
}

export const metadataMap = textMap({ maxValueLength: MAX_METADATA_VALUE_LENGTH });

export const environment = textMap({
  maxValueLength: MAX_ENV_VALUE_LENGTH,
  flawOfKey: (key) => (key.includes("=") ? "must be a key without =" : undefined),
});

/** An integer in a query string, where everything is text. */
export function queryInteger({ min, max, fallback }: { min: number; max: number; fallback: number }) {
  return z
    .string()
    .optional()
    .transform((value = String(fallback), context) => {
      const number = /^[0-9]{1,15}$/.test(value) ? Number(value) : Number.NaN;
      if (number >= min && number <= max) return number;
      context.addIssue({ code: "custom", message: `must be an integer from ${min} to ${max}` });
      return z.NEVER;
    })
    .meta({ type: "integer", minimum: min, maximum: max, default: fallback });
}

export const MAX_PAGE = 200;
export const DEFAULT_PAGE = 50;

/** The query of every list. */
export const pageQuery = {
  limit: queryInteger({ min: 1, max: MAX_PAGE, fallback: DEFAULT_PAGE }),
  cursor: z
    .string()
    .max(1024)
    .regex(/^[A-Za-z0-9_-]+$/, "must be a next_cursor of an earlier answer")
    .describe("The next_cursor of the page before.")
    .optional(),
};

export const PageQuery = z.strictObject(pageQuery);

export function pageOf<T extends z.ZodType>(item: T) {
  return z.object({ items: z.array(item), next_cursor: z.string().optional() });
}

/** The body of calls that take none: absent, or an empty object. */
export const NoBody = z.strictObject({}).nullish();

export const Time = z.iso.datetime().describe("RFC 3339, UTC.");

/** An id in a path. Typed as what it is, so that nobody has to say it again. */
export function idOf<T extends string>(isId: (text: string) => text is T, pattern: RegExp) {
  return z
    .custom<T>((value) => typeof value === "string" && isId(value))
    .meta({ type: "string", pattern: pattern.source });
}

export function isPlainObject(value: unknown): boolean {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

export function kindOf(value: unknown): string {
  if (value === null) return "null";
  if (Array.isArray(value)) return "an array";
  if (typeof value === "object") return "an object";
  return typeof value === "undefined" ? "absent" : `a ${typeof value}`;
}
