import assert from "node:assert/strict";
import { beforeAll, beforeEach, expect, test } from "vitest";
import { moveSandbox } from "../db/sandboxes.ts";
import { systemClock } from "../model/clock.ts";
import type { SandboxId } from "../model/ids.ts";
import { openServices } from "./open-services.ts";
import type { Caller, FollowEventsInput, FollowedEvent, Services } from "./services.ts";
import { DEFAULTS, type TestHost, type TestPlane, useTestPlane } from "./testing/test-plane.ts";

const MAX_STREAMS = 6;
const openPlane = useTestPlane({ maxStreamsPerTeam: MAX_STREAMS });
let plane: TestPlane;
let host: TestHost;
let caller: Caller;

beforeAll(async () => {
  plane = await openPlane();
  host = await plane.newHost();
});
beforeEach(async () => {
  host.agent.before = () => undefined;
  host.agent.after = () => undefined;
  caller = await plane.newCaller();
});

const create = async (who = caller): Promise<SandboxId> =>
  (await plane.services.createSandbox(who, DEFAULTS)).id;

/** A stream that is read in the background. */
class Reader implements AsyncDisposable {
  readonly items: FollowedEvent[] = [];
  readonly #end = new AbortController();
  #done: Promise<void> = Promise.resolve();

  static async open(input: FollowEventsInput = {}, who = caller, services: Services = plane.services) {
    const reader = new Reader();
    const events = await services.followEvents(who, input, reader.#end.signal);
    assert.ok(events);
    reader.#done = reader.#read(events);
    return reader;
  }

  async #read(events: AsyncIterable<FollowedEvent>): Promise<void> {
    for await (const item of events) this.items.push(item);
  }

  get words(): string[] {
    return this.items.map((item) =>
      item.kind === "reset" ? `reset ${item.after}` : `${item.event.number} ${item.event.status}`,
    );
  }

  async shows(words: string[]): Promise<void> {
    await expect.poll(() => this.words, { timeout: 10_000 }).toEqual(words);
  }

  /** It came to its end by itself. */
  ended(): Promise<void> {
    return this.#done;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#end.abort();
    await this.#done;
  }
}

test("a team's stream shows from now on what becomes of its sandboxes, and of no other team's", async () => {
  await create();
  await using reader = await Reader.open();
  const stranger = await plane.newCaller();
  await using theirs = await Reader.open({}, stranger);
  const id = await create();
  await create(stranger);
  await plane.services.pauseSandbox(caller, id);
  await plane.services.destroySandbox(caller, id);
  await reader.shows(["3 starting", "4 running", "5 pausing", "6 paused", "7 stopping", "8 stopped"]);
  assert.ok(reader.items.every((item) => item.kind === "event" && item.event.sandboxId === id));
  await theirs.shows(["1 starting", "2 running"]);
});

test("who comes back with his last event's number misses nothing, and gets nothing twice", async () => {
  await create();
  await using resumed = await Reader.open({ after: 1n });
  await resumed.shows(["2 running"]);
  await create();
  await resumed.shows(["2 running", "3 starting", "4 running"]);
  await using upToDate = await Reader.open({ after: 4n });
  await create();
  await upToDate.shows(["5 starting", "6 running"]);
});

test("who was away for longer than events are kept is told, and goes on with the oldest that is left", async () => {
  for (let index = 0; index < 3; index++) await create();
  await plane.deps.db
    .deleteFrom("sandbox_events")
    .where("team_id", "=", caller.teamId)
    .where("number", "<", 5n)
    .execute();
  await using late = await Reader.open({ after: 2n });
  await late.shows(["reset 4", "5 starting", "6 running"]);
  await using inTime = await Reader.open({ after: 4n });
  await inTime.shows(["5 starting", "6 running"]);
  // The database was restored from a backup: these numbers are still to come.
  await using future = await Reader.open({ after: 99n });
  await future.shows(["reset 6"]);
  await plane.deps.db.deleteFrom("sandbox_events").where("team_id", "=", caller.teamId).execute();
  await using none = await Reader.open({ after: 5n });
  await none.shows(["reset 6"]);
  await using all = await Reader.open({ after: 6n });
  const id = await create();
  await all.shows(["7 starting", "8 running"]);
  assert.ok(id);
});

test("what is deleted under a reader that sleeps shows as a reset", async () => {
  const end = new AbortController();
  await create();
  const events = await plane.services.followEvents(caller, { after: 0n }, end.signal);
  assert.ok(events);
  await plane.deps.db.deleteFrom("sandbox_events").where("team_id", "=", caller.teamId).execute();
  await create();
  const first: FollowedEvent[] = [];
  for await (const item of events) {
    first.push(item);
    if (first.length === 3) break;
  }
  end.abort();
  assert.deepEqual(
    first.map((item) => (item.kind === "reset" ? `reset ${item.after}` : item.event.number)),
    ["reset 2", 3n, 4n],
  );
});

test("a sandbox's stream begins with its oldest event, ends with it, and is over for who had all", async () => {
  await create();
  const id = await create();
  await using reader = await Reader.open({ sandboxId: id });
  await create();
  await plane.services.destroySandbox(caller, id);
  await reader.ended();
  assert.deepEqual(reader.words, ["3 starting", "4 running", "7 stopping", "8 stopped"]);
  await using again = await Reader.open({ sandboxId: id, after: 7n });
  await again.ended();
  assert.deepEqual(again.words, ["8 stopped"]);
  const end = new AbortController();
  assert.equal(
    await plane.services.followEvents(caller, { sandboxId: id, after: 8n }, end.signal),
    undefined,
  );
  const listed = await plane.services.listSandboxEvents(caller, id, { limit: 3 });
  assert.deepEqual(
    listed.items.map(({ number }) => number),
    [8n, 7n, 4n],
  );
});

test("another team finds no sandbox to follow or to list", async () => {
  const id = await create();
  const stranger = await plane.newCaller("platform");
  const { signal } = new AbortController();
  await assert.rejects(plane.services.followEvents(stranger, { sandboxId: id }, signal), {
    code: "not_found",
  });
  await assert.rejects(plane.services.listSandboxEvents(stranger, id, { limit: 1 }), { code: "not_found" });
});

test("a team has so many streams and no more, and one that ends makes room", async () => {
  const ends: AbortController[] = [];
  const open = () => {
    const end = new AbortController();
    ends.push(end);
    return plane.services.followEvents(caller, {}, end.signal);
  };
  for (let index = 0; index < MAX_STREAMS; index++) await open();
  await assert.rejects(open(), { code: "quota_exceeded" });
  const other = new AbortController();
  await plane.services.followEvents(await plane.newCaller(), {}, other.signal);
  // Not even read once.
  ends[0]?.abort();
  assert.ok(await open());
  for (const end of [...ends, other]) end.abort();
});

test("what one replica does reaches a stream of another at once", async () => {
  const other = await openPlane();
  const ending = new AbortController();
  // On a connection of its own, as another process would have it.
  const { db, close } = other.openAnother();
  const services = openServices({ ...other.deps, db });
  const listening = db.news.listen(systemClock, ending.signal);
  try {
    await expect.poll(() => db.news.isListening, { timeout: 10_000 }).toBe(true);
    await using reader = await Reader.open({}, caller, services);
    const id = await create();
    await reader.shows(["1 starting", "2 running"]);
    const row = await plane.services.getSandbox(caller, id);
    const latencies: number[] = [];
    for (let round = 0, at = row; round < 9; round++) {
      const before = reader.items.length;
      const began = performance.now();
      const moved = await moveSandbox(
        plane.deps.db,
        at,
        at.status === "paused" ? "seenRunning" : "seenPaused",
      );
      assert.ok(moved);
      at = moved;
      await expect.poll(() => reader.items.length, { interval: 1, timeout: 10_000 }).toBeGreaterThan(before);
      latencies.push(performance.now() - began);
    }
    const median = latencies.toSorted((a, b) => a - b)[4] ?? Infinity;
    // There is no poll here: news alone did it.
    assert.ok(median < 1_000, `${median} ms`);
  } finally {
    ending.abort();
    await listening;
    await close();
  }
});
