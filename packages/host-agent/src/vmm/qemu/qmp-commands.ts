/**
 * The QMP commands that we use: their arguments and, parsed, their answers.
 *
 * A VMM that a guest has taken over may answer anything: what we do not read
 * is dropped, what we read is bounded.
 */
import { z } from "zod";

const anything = z.unknown();
const nodeName = z.string().max(128);

/** A block node's definition, as `blockdev-add` and `-blockdev` take it. */
export interface BlockNode {
  driver: "file" | "raw" | "qcow2" | "host_device";
  "node-name": string;
  "read-only"?: boolean;
  filename?: string;
  /** Name of another node. */
  file?: string;
  /** Name of another node; null: none, whatever the file's header says. */
  backing?: string | null;
  discard?: "unmap" | "ignore";
}

export const ANSWERS = {
  qmp_capabilities: anything,
  "query-version": z.object({
    qemu: z.object({ major: z.number(), minor: z.number(), micro: z.number() }),
    package: z.string().max(256),
  }),
  "query-status": z.object({ status: z.string().max(64), running: z.boolean() }),
  stop: anything,
  cont: anything,
  quit: anything,
  "migrate-set-capabilities": anything,
  "migrate-set-parameters": anything,
  migrate: anything,
  "migrate-incoming": anything,
  "query-migrate": z.object({
    status: z.string().max(64).optional(),
    "error-desc": z.string().max(4096).optional(),
  }),
  "xen-save-devices-state": anything,
  "blockdev-add": anything,
  "blockdev-del": anything,
  "blockdev-reopen": anything,
  "blockdev-snapshot": anything,
  block_resize: anything,
  "query-named-block-nodes": z
    .array(
      z.object({
        "node-name": nodeName.optional(),
        file: z.string().max(4096),
        backing_file_depth: z.number().int().nonnegative(),
      }),
    )
    .max(4096),
  "query-block": z
    .array(
      z.object({
        qdev: z.string().max(256).optional(),
        inserted: z
          .object({ image: z.object({ "virtual-size": z.number().int().nonnegative() }) })
          .optional(),
      }),
    )
    .max(16),
  "ringbuf-read": z.string().max(1 << 20),
} as const satisfies Record<string, z.ZodType>;

export interface QmpArguments {
  "migrate-set-capabilities": {
    capabilities: { capability: "x-ignore-shared" | "events"; state: boolean }[];
  };
  "migrate-set-parameters": { "max-bandwidth": number };
  migrate: { uri: string };
  "migrate-incoming": { uri: string };
  "xen-save-devices-state": { filename: string; live: boolean };
  "blockdev-add": BlockNode;
  "blockdev-del": { "node-name": string };
  "blockdev-reopen": { options: BlockNode[] };
  "blockdev-snapshot": { node: string; overlay: string };
  block_resize: { "node-name": string; size: number };
  "query-named-block-nodes": { flat: boolean };
  "ringbuf-read": { device: string; size: number; format: "base64" };
}

export type QmpCommand = keyof typeof ANSWERS;
export type QmpAnswer<C extends QmpCommand> = z.output<(typeof ANSWERS)[C]>;
/** Commands without an entry take no arguments. */
export type QmpArgumentsOf<C extends QmpCommand> = C extends keyof QmpArguments
  ? QmpArguments[C]
  : Record<string, never>;
