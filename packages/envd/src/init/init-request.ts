/**
 * The body of POST /init: the host agent's EnvdInit, read by a schema of our
 * own, because the two sides are built and upgraded apart.
 */
import * as z from "zod/mini";
import { MAX_ARGUMENT_BYTES, MAX_PATH_BYTES } from "../limits.ts";

const noNul = (text: string) => !text.includes("\0");

const hex128 = z.string().check(z.regex(/^[0-9a-f]{32}$/));
/** HOST_NAME_MAX of Linux is 64. */
const hostname = z
  .string()
  .check(z.maxLength(64), z.regex(/^[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*$/i));
const timestamp = z.string().check(z.regex(/^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?Z$/));
const base64 = z.string().check(z.minLength(4), z.maxLength(4096), z.regex(/^[A-Za-z0-9+/]+={0,2}$/));
const envName = z.string().check(
  z.minLength(1),
  z.refine((name) => noNul(name) && !name.includes("=")),
);
const envValue = z.string().check(z.maxLength(MAX_ARGUMENT_BYTES), z.refine(noNul));

export const initRequestSchema = z.object({
  restoreId: hex128,
  sandboxId: z.string().check(z.regex(/^[a-z0-9]{1,64}$/)),
  hostname,
  machineId: hex128,
  timestamp,
  entropy: base64,
  envVars: z.record(envName, envValue),
  accessToken: z.string().check(z.minLength(1), z.maxLength(4096)),
  defaultUser: z.string().check(z.minLength(1), z.maxLength(64), z.refine(noNul)),
  defaultWorkdir: z.optional(z.string().check(z.maxLength(MAX_PATH_BYTES), z.refine(noNul))),
  growRootFs: z.boolean(),
});

export type InitRequest = z.infer<typeof initRequestSchema>;

/** Of an RFC 3339 time in UTC, with all its digits. */
export function parseTimestamp(text: string): { seconds: bigint; nanoseconds: bigint } {
  const [whole = "", fraction = ""] = text.replace(/Z$/, "").split(".");
  const ms = Date.parse(`${whole}Z`);
  if (Number.isNaN(ms)) throw new Error(`no such time: ${text}`);
  return { seconds: BigInt(ms / 1000), nanoseconds: BigInt(fraction.padEnd(9, "0")) };
}
