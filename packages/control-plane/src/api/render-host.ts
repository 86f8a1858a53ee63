/** Hosts, as JSON shows them. */
import type { z } from "zod";
import type { Host, HostContents, Page } from "../service/services.ts";
import type {
  Host as HostSchema,
  HostContents as HostContentsSchema,
  HostPage,
  HostRegistrationToken,
} from "./schemas/hosts.ts";

export function renderHost(host: Host): z.output<typeof HostSchema> {
  return {
    id: host.id,
    name: host.name,
    type: host.type,
    team_id: host.teamId,
    status: host.status,
    address: host.address,
    arch: host.arch,
    cpus: host.cpus,
    memory_mb: host.memoryMb,
    disk_mb: host.diskMb,
    drivers: host.drivers,
    version: host.version,
    labels: host.labels,
    sandboxes: host.sandboxes,
    strangers: host.strangers,
    strangers_untouched: host.strangersUntouched,
    last_heartbeat_at: host.lastHeartbeatAt?.toISOString(),
    revoked_at: host.revokedAt?.toISOString(),
    created_at: host.createdAt.toISOString(),
  };
}

export function renderHostPage({ items, nextCursor }: Page<Host>): z.output<typeof HostPage> {
  return { items: items.map(renderHost), next_cursor: nextCursor };
}

export function renderRegistrationToken(made: {
  host: Host;
  registrationToken: string;
  expiresAt: Date;
}): z.output<typeof HostRegistrationToken> {
  return {
    host: renderHost(made.host),
    registration_token: made.registrationToken,
    expires_at: made.expiresAt.toISOString(),
  };
}

export function renderHostContents(contents: HostContents): z.output<typeof HostContentsSchema> {
  return {
    sandboxes: contents.sandboxes.map(({ id, teamId, status }) => ({ id, team_id: teamId, status })),
    sandbox_count: contents.sandboxCount,
    snapshots: contents.snapshots.map(({ id, teamId, name, sizeBytes }) => ({
      id,
      team_id: teamId,
      name,
      size_bytes: sizeBytes,
    })),
    snapshot_count: contents.snapshotCount,
  };
}
