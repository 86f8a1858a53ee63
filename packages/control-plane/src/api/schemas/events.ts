/** Events of sandboxes, in lists and as the data of streams. */
import { z } from "zod";
import { Time, pageOf } from "./common.ts";
import { SandboxStatusSchema } from "./sandboxes.ts";

export const SandboxEvent = z
  .object({
    id: z
      .string()
      .regex(/^\d+$/)
      .describe("Counts the team's events, without gaps, in the order they happened."),
    sandbox_id: z.string(),
    previous_status: SandboxStatusSchema.optional().describe("Absent: it came into being."),
    status: SandboxStatusSchema,
    reason: z
      .string()
      .optional()
      .describe(
        "Why, where nobody asked for it, such as expired, guest_crashed, host_silent, moved. New ones may come.",
      ),
    error: z.object({ code: z.string(), message: z.string() }).optional(),
    host_id: z.string().optional(),
    created_at: Time,
  })
  .meta({ id: "SandboxEvent" });

export const SandboxEventPage = pageOf(SandboxEvent).meta({ id: "SandboxEventPage" });

/** The reader's last event: what its stream goes on after. */
export const LastEventHeaders = z.looseObject({
  "last-event-id": z
    .string()
    .regex(/^\d{1,18}$/, "must be the id of an event")
    .optional()
    .describe("The id of the last event that was read: the stream goes on after it."),
});
