/**
 * Tombstones: the highest generation of each destroyed sandbox, so that a late
 * command for it is refused instead of bringing it back.
 *
 * One append-only file, synced at each append and written anew when it has
 * grown to twice what counts. A tombstone is dropped after a day, or when there
 * are too many (the oldest first): commands carry deadlines of minutes.
 */
import { writeFileAtomic } from "../host/atomic-file.ts";
import type { SandboxId } from "../ids.ts";
import { LineFile } from "./line-file.ts";
import { tombstoneSchema, toJson, type Tombstone } from "./records.ts";

export interface TombstoneLimits {
  maxAgeMs: number;
  maxCount: number;
}

export class Tombstones {
  readonly #path: string;
  readonly #limits: TombstoneLimits;
  /** In order of age. */
  readonly #byId: Map<SandboxId, Tombstone>;
  #file: LineFile;
  #linesInFile: number;
  #lastWrite: Promise<void> = Promise.resolve();

  private constructor(
    path: string,
    limits: TombstoneLimits,
    byId: Map<SandboxId, Tombstone>,
    file: LineFile,
  ) {
    this.#path = path;
    this.#limits = limits;
    this.#byId = byId;
    this.#file = file;
    this.#linesInFile = byId.size;
  }

  static async open(path: string, limits: TombstoneLimits, nowMs: number): Promise<Tombstones> {
    const { file: before, lines } = await LineFile.open(path);
    await before.close();
    const byId = prune(
      lines.map((line) => tombstoneSchema.parse(JSON.parse(line))),
      limits,
      nowMs,
    );
    return new Tombstones(path, limits, byId, await writeAll(path, byId));
  }

  get(id: SandboxId): Tombstone | undefined {
    return this.#byId.get(id);
  }

  /** Durable when it returns. A lower generation than the known one changes nothing. */
  async add(tombstone: Tombstone): Promise<void> {
    const known = this.#byId.get(tombstone.id);
    if (known !== undefined && known.generation > tombstone.generation) return;
    this.#byId.delete(tombstone.id);
    this.#byId.set(tombstone.id, tombstone);
    await this.#write(async () => {
      await this.#file.append(toJson(tombstone));
      this.#linesInFile += 1;
      if (this.#linesInFile > 2 * this.#byId.size + 64 || this.#byId.size > this.#limits.maxCount) {
        await this.#compact(tombstone.destroyedAtMs);
      }
    });
  }

  async close(): Promise<void> {
    await this.#lastWrite;
    await this.#file.close();
  }

  async #compact(nowMs: number): Promise<void> {
    const kept = prune([...this.#byId.values()], this.#limits, nowMs);
    this.#byId.clear();
    for (const [id, tombstone] of kept) this.#byId.set(id, tombstone);
    const before = this.#file;
    this.#file = await writeAll(this.#path, this.#byId);
    this.#linesInFile = this.#byId.size;
    await before.close();
  }

  async #write(write: () => Promise<void>): Promise<void> {
    const mine = this.#lastWrite.then(write);
    // The next one waits for this one, whether it succeeds or not; the caller gets the failure.
    this.#lastWrite = mine.catch(() => undefined);
    await mine;
  }
}

/** Keeps four fifths of the bound, so that the file is not written anew at every addition. */
function prune(
  tombstones: readonly Tombstone[],
  limits: TombstoneLimits,
  nowMs: number,
): Map<SandboxId, Tombstone> {
  const latest = new Map<SandboxId, Tombstone>();
  for (const tombstone of tombstones) {
    latest.delete(tombstone.id);
    latest.set(tombstone.id, tombstone);
  }
  const young = [...latest.values()].filter((t) => nowMs - t.destroyedAtMs <= limits.maxAgeMs);
  const kept = young.length > limits.maxCount ? young.slice(-Math.ceil(limits.maxCount * 0.8)) : young;
  return new Map(kept.map((tombstone) => [tombstone.id, tombstone]));
}

async function writeAll(path: string, byId: ReadonlyMap<SandboxId, Tombstone>): Promise<LineFile> {
  await writeFileAtomic(path, [...byId.values()].map((tombstone) => `${toJson(tombstone)}\n`).join(""));
  return (await LineFile.open(path)).file;
}
