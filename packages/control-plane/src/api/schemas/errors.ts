/** The one shape of a failed call's answer. */
import { ERRORS, isErrorCode } from "@rookery/protocol/errors";
import type { ErrorCode } from "@rookery/protocol/errors";
import { z } from "zod";

export const ErrorCodeSchema = z
  .custom<ErrorCode>((value) => typeof value === "string" && isErrorCode(value))
  .meta({
    id: "ErrorCode",
    type: "string",
    enum: Object.keys(ERRORS),
    description: "One code per cause. docs/errors.md says what each means.",
  });

export const ErrorAnswer = z
  .object({
    error: z.object({
      code: ErrorCodeSchema,
      message: z.string().describe("What failed and what to do next. For people: never decide by it."),
      details: z
        .record(z.string(), z.unknown())
        .optional()
        .describe("Facts of the cause, such as field and reason, or status."),
    }),
  })
  .meta({ id: "Error" });
