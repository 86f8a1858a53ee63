/**
 * The event log: what this agent did by itself, numbered, on disk, until the
 * control plane has acknowledged it.
 *
 * JSON lines in segments named by their first number; `log.json` holds the
 * log's id and the last acknowledged and dropped numbers. An append is synced
 * before it returns. The log is bounded: beyond its cap the oldest segment is
 * dropped and `droppedThrough` marks it, so that the gap is known for one.
 *
 * Numbers of another log id mean nothing: a lost directory gets a new id.
 */
import { mkdir, readdir } from "node:fs/promises";
import { join } from "node:path";
import { z } from "zod";
import { readJson, removeTree, syncDirectory, writeFileAtomic } from "../host/atomic-file.ts";
import { isErrno } from "../host/errno.ts";
import { LineFile } from "../journal/line-file.ts";
import { sandboxIdSchema, toJson } from "../journal/records.ts";
import type { HostEvent, HostEventLog } from "../sandbox-manager/sandbox.ts";
import { RookeryError } from "@rookery/protocol/errors";

const bigintText = z
  .string()
  .regex(/^-?\d{1,19}$/)
  .transform(BigInt);
const eventSchema = z.object({
  number: bigintText,
  sandboxId: sandboxIdSchema,
  generation: bigintText,
  kind: z.enum(["paused", "stopped", "failed", "resumed"]),
  reason: z.string(),
  message: z.string(),
  occurredAtUnixMs: z.number(),
});
const headSchema = z.object({
  version: z.literal(1),
  logId: z.string().min(1),
  acknowledged: bigintText,
  droppedThrough: bigintText,
});
const SEGMENT = /^(\d{19})\.jsonl$/;

export interface EventLogOptions {
  dir: string;
  newLogId: () => string;
  /** Events kept at most, whether acknowledged or not. */
  maxEvents: number;
  /** Events in one segment; what is pruned is whole segments. */
  segmentEvents?: number;
}

interface Segment {
  first: bigint;
  events: HostEvent[];
}

export class EventLog implements HostEventLog {
  readonly #options: Required<EventLogOptions>;
  #head: z.output<typeof headSchema>;
  /** In memory too: the bound is small, and a reader must not wait for the disk. */
  readonly #segments: Segment[];
  #lastNumber: bigint;
  #file: LineFile | undefined;
  #lastWrite: Promise<void> = Promise.resolve();
  readonly #waiting = new Set<() => void>();

  private constructor(
    options: Required<EventLogOptions>,
    head: z.output<typeof headSchema>,
    segments: Segment[],
  ) {
    this.#options = options;
    this.#head = head;
    this.#segments = segments;
    this.#lastNumber =
      segments.at(-1)?.events.at(-1)?.number ?? maxOf(head.acknowledged, head.droppedThrough);
  }

  static async open(given: EventLogOptions): Promise<EventLog> {
    const options = { segmentEvents: 256, ...given };
    await mkdir(options.dir, { recursive: true, mode: 0o700 });
    const segments = await readSegments(options.dir);
    const head = await openHead(options, segments);
    const log = new EventLog(options, head, segments);
    await log.#prune();
    return log;
  }

  get logId(): string {
    return this.#head.logId;
  }
  get lastNumber(): bigint {
    return this.#lastNumber;
  }
  get acknowledged(): bigint {
    return this.#head.acknowledged;
  }
  /** Events up to this number were dropped without having been acknowledged; 0 when none were. */
  get droppedThrough(): bigint {
    return this.#head.droppedThrough;
  }

  /** Durable when it returns. */
  async append(event: Omit<HostEvent, "number">): Promise<HostEvent> {
    return await this.#exclusively(async () => {
      const numbered: HostEvent = { number: this.lastNumber + 1n, ...event };
      const { segment, file } = await this.#segmentForAppend(numbered.number);
      await file.append(toJson(numbered));
      segment.events.push(numbered);
      this.#lastNumber = numbered.number;
      await this.#prune();
      for (const wake of this.#waiting) wake();
      return numbered;
    });
  }

  async *read(options: { after: bigint; follow: boolean; signal: AbortSignal }): AsyncGenerator<HostEvent> {
    let after = options.after;
    while (!options.signal.aborted) {
      const next = this.#firstAfter(after);
      if (next !== undefined) {
        after = next.number;
        yield next;
      } else if (options.follow) {
        await this.#nextAppend(options.signal);
      } else {
        return;
      }
    }
  }

  async acknowledge(logId: string, number: bigint): Promise<void> {
    await this.#exclusively(async () => {
      if (logId !== this.#head.logId) {
        throw new RookeryError("wrong_state", "this event log is another one: read it from its beginning");
      }
      if (number > this.lastNumber) {
        throw new RookeryError("invalid_request", `event ${number} has not happened yet`);
      }
      if (number <= this.#head.acknowledged) return;
      await this.#writeHead({ ...this.#head, acknowledged: number });
      await this.#prune();
    });
  }

  async close(): Promise<void> {
    await this.#exclusively(async () => {
      await this.#file?.close();
      this.#file = undefined;
    });
  }

  #firstAfter(after: bigint): HostEvent | undefined {
    for (const segment of this.#segments) {
      const last = segment.events.at(-1);
      if (last === undefined || last.number <= after) continue;
      return segment.events.find((event) => event.number > after);
    }
    return undefined;
  }

  async #nextAppend(signal: AbortSignal): Promise<void> {
    await new Promise<void>((resolve) => {
      const wake = () => {
        this.#waiting.delete(wake);
        signal.removeEventListener("abort", wake);
        resolve();
      };
      this.#waiting.add(wake);
      signal.addEventListener("abort", wake, { once: true });
      if (signal.aborted) wake();
    });
  }

  async #segmentForAppend(number: bigint): Promise<{ segment: Segment; file: LineFile }> {
    const last = this.#segments.at(-1);
    if (last !== undefined && last.events.length < this.#options.segmentEvents) {
      this.#file ??= (await LineFile.open(this.#path(last.first))).file;
      return { segment: last, file: this.#file };
    }
    await this.#file?.close();
    this.#file = undefined;
    const { file } = await LineFile.open(this.#path(number));
    this.#file = file;
    await syncDirectory(this.#options.dir);
    const segment: Segment = { first: number, events: [] };
    this.#segments.push(segment);
    return { segment, file };
  }

  /** Drops whole segments that are acknowledged, and the oldest ones beyond the cap. */
  async #prune(): Promise<void> {
    let count = this.#segments.reduce((sum, segment) => sum + segment.events.length, 0);
    for (;;) {
      const oldest = this.#segments[0];
      const last = oldest?.events.at(-1);
      if (oldest === undefined || last === undefined || this.#segments.length === 1) return;
      const acknowledged = last.number <= this.#head.acknowledged;
      if (!acknowledged && count <= this.#options.maxEvents) return;
      // The mark first: a crash between the two leaves a segment that the next start drops again.
      if (!acknowledged) await this.#writeHead({ ...this.#head, droppedThrough: last.number });
      await removeTree(this.#path(oldest.first));
      this.#segments.shift();
      count -= oldest.events.length;
    }
  }

  async #writeHead(head: z.output<typeof headSchema>): Promise<void> {
    await writeFileAtomic(join(this.#options.dir, "log.json"), toJson(head));
    this.#head = head;
  }

  #path(first: bigint): string {
    return join(this.#options.dir, `${first.toString().padStart(19, "0")}.jsonl`);
  }

  async #exclusively<T>(work: () => Promise<T>): Promise<T> {
    const mine = this.#lastWrite.then(work);
    // The next one waits for this one, whether it succeeds or not; the caller gets the failure.
    this.#lastWrite = mine.then(
      () => undefined,
      () => undefined,
    );
    return await mine;
  }
}

async function openHead(
  options: Required<EventLogOptions>,
  segments: Segment[],
): Promise<z.output<typeof headSchema>> {
  const path = join(options.dir, "log.json");
  try {
    return await readJson(path, headSchema);
  } catch (cause) {
    if (!isErrno(cause, "ENOENT")) throw cause;
  }
  // Events without a head belong to a log that nobody can name any more.
  for (const segment of segments.splice(0)) {
    await removeTree(join(options.dir, `${segment.first.toString().padStart(19, "0")}.jsonl`));
  }
  const head = { version: 1 as const, logId: options.newLogId(), acknowledged: 0n, droppedThrough: 0n };
  await writeFileAtomic(path, toJson(head));
  return head;
}

async function readSegments(dir: string): Promise<Segment[]> {
  const segments: Segment[] = [];
  const names = (await readdir(dir)).filter((name) => SEGMENT.test(name)).sort();
  for (const name of names) {
    const path = join(dir, name);
    const { file, lines } = await LineFile.open(path);
    await file.close();
    const events = lines.map((line) => eventSchema.parse(JSON.parse(line)));
    if (events.length === 0) await removeTree(path);
    else segments.push({ first: BigInt(SEGMENT.exec(name)![1]!), events });
  }
  return segments;
}

function maxOf(a: bigint, b: bigint): bigint {
  return a > b ? a : b;
}
