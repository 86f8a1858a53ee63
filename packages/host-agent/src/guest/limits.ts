/**
 * What the agent grants a guest: envd is hostile, so every answer of it is
 * bounded in size, depth and time. The numbers are far above what an honest
 * envd needs and far below what would hurt the host.
 */
export interface GuestLimits {
  /** Attempts to reach a guest that takes no connection end after this. */
  connectMs: number;
  /** From request to the head of the answer, where the guest has nothing to wait for. */
  answerMs: number;
  /** `/init` may grow the file system, which is slow under emulation. */
  initMs: number;
  /** Silence in the middle of a file. */
  fileIdleMs: number;
  /** After SIGKILL, until the end of the process is reported. */
  killGraceMs: number;
  /** Longest time of a command; also what 0 ("no limit") means. */
  commandMs: number;
  /** Bodies that are small by nature: errors, unary answers. */
  smallBodyBytes: number;
  /** One message of a stream. envd sends pieces of at most 64 KiB. */
  messageBytes: number;
  /** Nesting of JSON. */
  jsonDepth: number;
  /** No file is larger than the largest disk (65536 MB). */
  fileBytes: number;
  /** Calls under way at once to one guest. */
  calls: number;
  /** Piece in which stdin is sent. */
  stdinChunkBytes: number;
  /** An unused connection is closed after this. Servers in guests close after 5 s by Node's default. */
  keepAliveMs: number;
}

export const GUEST_LIMITS: Readonly<GuestLimits> = Object.freeze({
  connectMs: 3_000,
  answerMs: 30_000,
  initMs: 60_000,
  fileIdleMs: 30_000,
  killGraceMs: 3_000,
  commandMs: 24 * 3_600_000,
  smallBodyBytes: 64 << 10,
  messageBytes: 1 << 20,
  jsonDepth: 16,
  fileBytes: 65_536 * 1024 * 1024,
  calls: 256,
  stdinChunkBytes: 256 << 10,
  keepAliveMs: 60_000,
});
