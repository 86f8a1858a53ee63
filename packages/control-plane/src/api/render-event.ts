/** Events, as JSON shows them. */
import type { z } from "zod";
import type { Page, SandboxEvent } from "../service/services.ts";
import type { SandboxEvent as SandboxEventSchema, SandboxEventPage } from "./schemas/events.ts";

export function renderSandboxEvent(event: SandboxEvent): z.output<typeof SandboxEventSchema> {
  return {
    id: `${event.number}`,
    sandbox_id: event.sandboxId,
    previous_status: event.previousStatus,
    status: event.status,
    reason: event.reason,
    error: event.error && { code: event.error.code, message: event.error.message },
    host_id: event.hostId,
    created_at: event.createdAt.toISOString(),
  };
}

export function renderSandboxEventPage({
  items,
  nextCursor,
}: Page<SandboxEvent>): z.output<typeof SandboxEventPage> {
  return { items: items.map(renderSandboxEvent), next_cursor: nextCursor };
}
