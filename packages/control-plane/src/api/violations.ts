/**
 * What a caller is told of a request that breaks a schema: which field, and
 * why, in words that need no knowledge of the validator.
 */
import { RookeryError } from "@rookery/protocol/errors";
import type { z } from "zod";
import { kindOf } from "./schemas/common.ts";

export interface Violation {
  field: string;
  reason: string;
}

type Issue = z.core.$ZodIssue;

const MAX_VIOLATIONS = 16;
const MAX_FIELD_LENGTH = 160;

/** One error for all violations: the first decides its message. */
export function invalidRequest(violations: readonly Violation[], place: string): RookeryError {
  const [first = { field: "", reason: "is not valid" }] = violations;
  const subject = first.field === "" ? `the ${place}` : first.field;
  return new RookeryError("invalid_request", `${subject} ${first.reason}`, {
    details: {
      field: first.field,
      reason: first.reason,
      ...(violations.length > 1 ? { violations: violations.slice(0, MAX_VIOLATIONS) } : {}),
    },
  });
}

export function invalidField(field: string, reason: string): RookeryError {
  return invalidRequest([{ field, reason }], "request");
}

export function violationsOf(error: z.core.$ZodError, data: unknown): Violation[] {
  return error.issues.slice(0, MAX_VIOLATIONS).map((issue) => violationOf(issue, data));
}

function violationOf(issue: Issue, data: unknown): Violation {
  if (issue.code === "unrecognized_keys") {
    return {
      field: fieldOf([...issue.path, issue.keys[0] ?? ""]),
      reason: "is not a field of this request",
    };
  }
  return { field: fieldOf(issue.path), reason: reasonOf(issue, valueAt(data, issue.path)) };
}

function fieldOf(path: readonly PropertyKey[]): string {
  const field = path
    .map(String)
    .join(".")
    .replaceAll(/\p{Cc}/gu, "\uFFFD")
    .toWellFormed();
  return field.length > MAX_FIELD_LENGTH ? `${field.slice(0, MAX_FIELD_LENGTH)}…` : field;
}

function reasonOf(issue: Issue, value: unknown): string {
  switch (issue.code) {
    case "invalid_type":
      if (value === undefined) return "is required";
      if (issue.expected === "int" && typeof value === "number") return "must be an integer";
      return `must be ${kindWanted(issue.expected)}, but is ${kindOf(value)}`;
    case "invalid_value":
      return `must be ${listOf(issue.values)}`;
    case "too_big":
      return `must be at most ${issue.maximum}${unitOf(issue.origin)}`;
    case "too_small":
      return issue.origin === "string" && issue.minimum === 1
        ? "must not be empty"
        : `must be ${issue.inclusive === false ? "more than" : "at least"} ${issue.minimum}${unitOf(issue.origin)}`;
    default:
      return issue.message;
  }
}

function kindWanted(expected: string): string {
  if (expected === "int") return "an integer";
  return /^[aeiou]/.test(expected) ? `an ${expected}` : `a ${expected}`;
}

function unitOf(origin: string): string {
  if (origin === "string") return " characters";
  return origin === "array" ? " items" : "";
}

function listOf(values: readonly unknown[]): string {
  const words = values.map(String);
  if (words.length <= 1) return words.join("");
  return `${words.slice(0, -1).join(", ")} or ${words.at(-1)}`;
}

function valueAt(data: unknown, path: readonly PropertyKey[]): unknown {
  let value = data;
  for (const key of path) {
    if (typeof value !== "object" || value === null || !Object.hasOwn(value, key)) return undefined;
    value = Reflect.get(value, key);
  }
  return value;
}
