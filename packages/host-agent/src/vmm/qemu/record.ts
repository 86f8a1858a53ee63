/** What the journal keeps of a QEMU, beyond its process: enough to find its memory and its base again. */
import { z } from "zod";

const fileIdentity = z.object({ dev: z.string(), ino: z.string() });

export const qemuRecordSchema = z.object({
  acceleration: z.enum(["kvm", "tcg"]),
  fingerprint: z.string(),
  /** The guest's memory and the streams' memfd. */
  memory: fileIdentity,
  state: fileIdentity,
  shape: z.object({ vcpus: z.number().int().positive(), memoryMb: z.number().int().positive() }),
  /** Absent: cold-booted. */
  base: z
    .object({
      dir: z.string(),
      memorySha256: z.string(),
      deviceStateSha256: z.string(),
    })
    .optional(),
});

export type QemuRecord = z.output<typeof qemuRecordSchema>;
