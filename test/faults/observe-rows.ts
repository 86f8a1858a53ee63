/** What the database says, for the oracle. */
import type { Observed } from "./world.ts";

export async function observeRows(
  query: (text: string) => Promise<unknown[]>,
): Promise<Omit<Observed, "machines">> {
  // One statement, so one moment.
  const [row] = await query(`
      select json_build_object(
        'sandboxes', (select coalesce(json_agg(json_build_object('id', id, 'status', status,
           'generation', generation::text, 'commandGeneration', command_generation::text, 'hostId', host_id,
           'tag', metadata ->> 'tag', 'hasStarted', started_at is not null, 'errorCode', error_code)), '[]') from sandboxes),
        'snapshots', (select coalesce(json_agg(json_build_object('id', id, 'name', name, 'status', status,
           'hostId', host_id)), '[]') from snapshots),
        'hosts', (select coalesce(json_agg(json_build_object('id', id, 'status', status,
           'eventLogId', event_log_id, 'acknowledgedEvent', acknowledged_event::text)), '[]') from hosts),
        'teams', (select coalesce(json_agg(json_build_object('id', id, 'live', live_sandboxes, 'counted',
           (select count(*) from sandboxes where team_id = teams.id and status not in ('stopped', 'error')))), '[]')
           from teams)) as all`);
  const seen = row as { all: Record<string, Record<string, string | number | boolean | null>[]> } | undefined;
  const { sandboxes = [], snapshots = [], hosts = [], teams = [] } = seen?.all ?? {};
  const text = (value: unknown): string | undefined => (typeof value === "string" ? value : undefined);
  return {
    sandboxes: sandboxes.map((row) => ({
      id: String(row["id"]),
      status: String(row["status"]),
      generation: BigInt(String(row["generation"])),
      commandGeneration: BigInt(String(row["commandGeneration"])),
      hostId: text(row["hostId"]),
      tag: text(row["tag"]),
      hasStarted: row["hasStarted"] === true,
      errorCode: text(row["errorCode"]),
    })),
    snapshots: snapshots.map((row) => ({
      id: String(row["id"]),
      name: String(row["name"]),
      status: String(row["status"]),
      hostId: String(row["hostId"]),
    })),
    hosts: hosts.map((row) => ({
      id: String(row["id"]),
      status: String(row["status"]),
      eventLogId: text(row["eventLogId"]),
      acknowledgedEvent: BigInt(String(row["acknowledgedEvent"])),
    })),
    teams: teams.map((row) => ({
      id: String(row["id"]),
      live: Number(row["live"]),
      counted: Number(row["counted"]),
    })),
  };
}
