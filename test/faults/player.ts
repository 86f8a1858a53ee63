/**
 * Plays a schedule: callers who ask, do not always hear, and ask again; several
 * at once. What they were told goes into the history.
 */
import { setTimeout as sleep } from "node:timers/promises";
import { z } from "zod";
import type { CreateRecord, History } from "./history.ts";
import type { Operation, Schedule } from "./schedule.ts";
import { type ApiAnswer, type ApiRequest, NoAnswer, type World } from "./world.ts";

const withId = z.object({ id: z.string() });
const execAnswer = z.object({ stdout: z.string() });
const failure = z.object({ error: z.object({ code: z.string(), message: z.string() }) });

export async function play(world: World, schedule: Schedule, history: History): Promise<void> {
  const underWay = new Set<Promise<void>>();
  for (const [index, step] of schedule.steps.entries()) {
    if (step.gapMs > 0) await sleep(step.gapMs * schedule.pace);
    if ("fault" in step) {
      await world.inject(step.fault);
      continue;
    }
    while (underWay.size >= schedule.inFlight) await Promise.race(underWay);
    const { operation } = step;
    const caller = new Caller(world, schedule, history);
    const done = caller.perform(operation, String(index)).finally(() => underWay.delete(done));
    underWay.add(done);
  }
  await Promise.all(underWay);
}

export class Caller {
  readonly #world: World;
  readonly #replicas: number;
  readonly #focus: number;
  readonly #history: History;

  constructor(world: World, { replicas, focus }: Pick<Schedule, "replicas" | "focus">, history: History) {
    this.#world = world;
    this.#replicas = replicas;
    this.#focus = focus;
    this.#history = history;
  }

  async perform(operation: Operation, tag: string): Promise<void> {
    const history = this.#history;
    switch (operation.kind) {
      case "create": {
        const { timeoutSec, onTimeout } = operation;
        const body = { timeout_sec: timeoutSec, on_timeout: onTimeout, metadata: { tag } };
        return this.#create(operation, {
          tag,
          key: operation.key ? `key-${tag}` : undefined,
          body,
          ids: new Set(),
        });
      }
      case "create-from": {
        const template = choose(history.snapshots, operation.snapshot);
        if (template === undefined) return;
        const body = { template, timeout_sec: 0, metadata: { tag } };
        return this.#create(operation, {
          tag,
          key: operation.key ? `key-${tag}` : undefined,
          body,
          ids: new Set(),
        });
      }
      case "create-again": {
        const keyed = history.creates.filter(({ key }) => key !== undefined);
        const earlier = choose(keyed, operation.create);
        return earlier && this.#create(operation, earlier);
      }
      case "list":
        await this.#ask(operation, { method: "GET", path: "/v1/sandboxes?limit=20" });
        return;
      case "delete-snapshot": {
        const name = choose(history.snapshots, operation.snapshot);
        if (name === undefined) return;
        await this.#ask(operation, { method: "DELETE", path: `/v1/snapshots/${name}` });
        return;
      }
      default: {
        const id = choose(history.sandboxes.slice(-this.#focus), operation.sandbox);
        if (id !== undefined) await this.#onSandbox(operation, id, tag);
      }
    }
  }

  async #onSandbox(
    operation: Exclude<Operation, { kind: `create${string}` | "list" | "delete-snapshot" }>,
    id: string,
    tag: string,
  ): Promise<void> {
    const history = this.#history;
    const path = `/v1/sandboxes/${id}`;
    switch (operation.kind) {
      case "exec": {
        const request = { method: "POST" as const, path: `${path}/exec`, body: { cmd: "note", args: [tag] } };
        const answer = await this.#ask(operation, request);
        if (answer?.status !== 200) return;
        const { stdout } = execAnswer.parse(answer.body);
        if (stdout !== id) this.#wrong("another guest answered", request, answer);
        const written = history.written.get(id) ?? new Set();
        history.written.set(id, written.add(tag));
        return;
      }
      case "get":
        await this.#ask(operation, { method: "GET", path });
        return;
      case "patch":
        await this.#ask(operation, { method: "PATCH", path, body: { timeout_sec: operation.timeoutSec } });
        return;
      case "destroy": {
        const answer = await this.#ask(operation, { method: "DELETE", path });
        if (answer?.status === 204) history.destroyed.add(id);
        return;
      }
      case "snapshot": {
        const { name, overwrite } = operation;
        const body = { sandbox_id: id, name, overwrite };
        const answer = await this.#ask(operation, { method: "POST", path: "/v1/snapshots", body });
        if (answer?.status === 201 && !history.snapshots.includes(name)) history.snapshots.push(name);
        return;
      }
      default:
        await this.#ask(operation, { method: "POST", path: `${path}/${operation.kind}` });
    }
  }

  async #create(operation: Operation, record: CreateRecord): Promise<void> {
    const history = this.#history;
    if (!history.creates.includes(record)) history.creates.push(record);
    const request = {
      method: "POST" as const,
      path: "/v1/sandboxes",
      body: record.body,
      ...(record.key !== undefined && { idempotencyKey: record.key }),
    };
    const answer = await this.#ask(operation, request);
    if (answer?.status !== 201) return;
    const { id } = withId.parse(answer.body);
    record.ids.add(id);
    history.knows(id);
  }

  /** Undefined: no answer at all. */
  async #ask(operation: Operation, request: ApiRequest): Promise<ApiAnswer | undefined> {
    const history = this.#history;
    const first = Math.floor(operation.replica * this.#replicas);
    for (let attempt = 0; ; attempt += 1) {
      let answer: ApiAnswer | undefined;
      try {
        answer = await this.#world.call((first + attempt) % this.#replicas, request);
        history.answers += 1;
        this.#check(request, answer);
      } catch (cause) {
        if (!(cause instanceof NoAnswer)) throw cause;
        history.unanswered += 1;
      }
      const isOver = answer !== undefined && answer.status < 500;
      if (isOver || attempt >= operation.retries) return answer;
    }
  }

  #check(request: ApiRequest, answer: ApiAnswer): void {
    if (answer.status < 400) return;
    const parsed = failure.safeParse(answer.body);
    if (!parsed.success) this.#wrong("an error without a code", request, answer);
    else if (parsed.data.error.code === "internal") this.#wrong("a fault of ours", request, answer);
    else if (answer.status === 401 || answer.status === 403)
      this.#wrong("a good key was refused", request, answer);
  }

  #wrong(what: string, request: ApiRequest, answer: ApiAnswer): void {
    const { method, path } = request;
    const told = `${answer.status} ${JSON.stringify(answer.body)}`.slice(0, 300);
    this.#history.wrongAnswers.push({ what, request: `${method} ${path}`, answer: told });
  }
}

function choose<T>(list: readonly T[], choice: number): T | undefined {
  return list[Math.floor(choice * list.length)];
}
