/** Intervals of the real programs, in milliseconds at pace 1; all of them follow the pace. */
export const CONTROL_PLANE_TIMES = {
  ROOKERY_CREATE_MS: 2_500,
  ROOKERY_PAUSE_MS: 1_500,
  ROOKERY_RESUME_MS: 1_500,
  ROOKERY_DESTROY_MS: 1_500,
  ROOKERY_SNAPSHOT_MS: 1_500,
  ROOKERY_OPERATION_LEASE_MS: 600,
  ROOKERY_SWEEP_MS: 100,
  ROOKERY_HOST_CHECK_MS: 200,
  ROOKERY_HOST_CHECK_LIMIT_MS: 1_000,
  ROOKERY_HOST_SILENT_MS: 700,
  ROOKERY_EVENT_LEASE_MS: 600,
  // So that agents renew theirs within a run.
  ROOKERY_ACCESS_TOKEN_MS: 2_000,
} as const;

export const AGENT_TIMES = {
  ROOKERY_HEARTBEAT_MS: 100,
  ROOKERY_LOST_AFTER_MS: 1_500,
  ROOKERY_REAPER_MS: 100,
} as const;

export const AGENT_SETTINGS = {
  ROOKERY_VMM: "simulated",
  ROOKERY_POOL: "0",
  ROOKERY_MAX_SANDBOXES: "40",
  ROOKERY_MEMORY_PERCENT: "10000",
  ROOKERY_HANG_WATCH_MS: "0",
  // Lets a file in the data directory arm failpoints.
  ROOKERY_TEST: "1",
} as const;

export const SECRET_KEY = "a secret key for runs of the fault suite";
/** Runs the database and the control plane, as `up` has it. */
export const SERVICE_UID = 64_750;
export const AGENT_PORT = 7071;
export const API_PORT = 8080;
export const FRONT_DOOR_PORT = 8443;
export const DATABASE_PORT = 5432;

export function paced(times: Readonly<Record<string, number>>, pace: number): Record<string, string> {
  return Object.fromEntries(Object.entries(times).map(([name, ms]) => [name, String(Math.round(ms * pace))]));
}
