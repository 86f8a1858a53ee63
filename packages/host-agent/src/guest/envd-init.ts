/**
 * What `POST /init` of envd takes after each restore. envd answers 204 once per
 * restore; only then may user code run.
 */
export interface EnvdInit {
  /** 32 hex characters, new at each restore. */
  restoreId: string;
  sandboxId: string;
  hostname: string;
  /** 32 hex characters, for /etc/machine-id. */
  machineId: string;
  /** RFC 3339 with nanoseconds or milliseconds. */
  timestamp: string;
  /** 64 random bytes, base64: credited to the kernel's pool, then reseeded. */
  entropy: string;
  envVars: Record<string, string>;
  accessToken: string;
  defaultUser: string;
  defaultWorkdir?: string;
  /** Grow the root file system to its block device. */
  growRootFs: boolean;
}
