/**
 * The contents of files that do not change, remembered: reading an image of
 * hundreds of megabytes again for each snapshot would be slow.
 */
import { stat } from "node:fs/promises";
import { z } from "zod";
import { readJson, writeFileAtomic } from "../host/atomic-file.ts";
import { contentRefOf, type ContentRef } from "./sparse-stream.ts";

const MAX_REMEMBERED = 1_000;
/** Smaller ones are read faster than looked up. */
const WORTH_BYTES = 1 << 20;

const schema = z.record(
  z.string(),
  z.object({
    identity: z.string(),
    ref: z.object({ sha256: z.string(), bytes: z.number(), dataBytes: z.number() }),
  }),
);

export class ContentRefs {
  readonly #file: string;
  readonly #known: Map<string, { identity: string; ref: ContentRef }>;

  private constructor(file: string, known: z.output<typeof schema>) {
    this.#file = file;
    this.#known = new Map(Object.entries(known));
  }

  /** What cannot be read is found anew. */
  static async open(file: string): Promise<ContentRefs> {
    return new ContentRefs(file, await readJson(file, schema).catch(() => ({})));
  }

  async of(path: string, signal: AbortSignal): Promise<ContentRef> {
    const { ino, size, mtimeMs } = await stat(path);
    const identity = `${ino} ${size} ${mtimeMs}`;
    const known = this.#known.get(path);
    if (known?.identity === identity) return known.ref;
    const ref = await contentRefOf(path, signal);
    if (size < WORTH_BYTES) return ref;
    this.#known.delete(path);
    this.#known.set(path, { identity, ref });
    for (const oldest of this.#known.keys()) {
      if (this.#known.size <= MAX_REMEMBERED) break;
      this.#known.delete(oldest);
    }
    await writeFileAtomic(this.#file, JSON.stringify(Object.fromEntries(this.#known)), { sync: false });
    return ref;
  }
}
