/** Sandboxes, as JSON shows them. */
import type { z } from "zod";
import type { Sandbox, SandboxSummary } from "../model/sandbox.ts";
import type { Page } from "../service/services.ts";
import type { Sandbox as SandboxSchema, SandboxPage } from "./schemas/sandboxes.ts";

export type SandboxJson = z.output<typeof SandboxSchema>;

export function renderSandbox(sandbox: Sandbox): SandboxJson {
  return { ...renderSummary(sandbox), env: sandbox.env };
}

function renderSummary(sandbox: SandboxSummary): SandboxJson {
  return {
    id: sandbox.id,
    status: sandbox.status,
    template: sandbox.template,
    host_id: sandbox.hostId,
    vcpus: sandbox.vcpus,
    memory_mb: sandbox.memoryMb,
    disk_mb: sandbox.diskMb,
    timeout_sec: sandbox.timeoutSec,
    on_timeout: sandbox.onTimeout,
    timeout_mode: sandbox.timeoutMode,
    metadata: sandbox.metadata,
    created_at: sandbox.createdAt.toISOString(),
    started_at: sandbox.startedAt?.toISOString(),
    expires_at: sandbox.expiresAt?.toISOString(),
    ended_at: sandbox.endedAt?.toISOString(),
    error: sandbox.error && { code: sandbox.error.code, message: sandbox.error.message },
    disk_used_bytes: sandbox.diskUsedBytes,
  };
}

export function renderSandboxPage({ items, nextCursor }: Page<SandboxSummary>): z.output<typeof SandboxPage> {
  return { items: items.map(renderSummary), next_cursor: nextCursor };
}
