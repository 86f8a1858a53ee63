/** Streams of events over real connections. */
import { afterEach, beforeEach, describe, expect, test, vi } from "vitest";
import type { SandboxId } from "../model/ids.ts";
import type { FollowedEvent } from "../service/services.ts";
import { RawConnection, listen, requestHead } from "./testing/raw-http.ts";
import { type TestApi, openTestApi } from "./testing/test-api.ts";

// Machines that run every suite at once are slow.
vi.setConfig({ testTimeout: 60_000 });

const EVENT_STREAM = "text/event-stream";
let api: TestApi;
let port: number;
let isClosed: boolean;

beforeEach(async () => {
  isClosed = false;
  api = await openTestApi({ limits: { heartbeatMs: 100, streamStallMs: 400 } });
  port = await listen(api.app);
});
afterEach(async () => {
  if (!isClosed) await api[Symbol.asyncDispose]();
});

const event = (number: bigint, reason?: string): FollowedEvent => ({
  kind: "event",
  event: {
    number,
    sandboxId: "sb000000000000000000" as SandboxId,
    previousStatus: "running",
    status: "paused",
    reason,
    createdAt: new Date(0),
  },
});

function open(path = "/v1/events", headers: Record<string, string> = {}, signal?: AbortSignal) {
  return fetch(`http://127.0.0.1:${port}${path}`, {
    headers: { "x-api-key": api.services.keys.member, accept: EVENT_STREAM, ...headers },
    signal,
  });
}

/** What has come when `isEnough` says so, or the stream has ended. */
async function read(response: Response, isEnough: (text: string) => boolean): Promise<string> {
  const reader = response.body?.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  if (!reader) return text;
  while (!isEnough(text)) {
    const { done, value } = await reader.read();
    if (done) break;
    text += value;
  }
  reader.releaseLock();
  return text;
}

describe("a stream of events", () => {
  test("gives each event as a frame with its id, and its data as JSON", async () => {
    api.services.events = [event(7n, "expired"), { kind: "reset", after: 11n }, event(12n)];
    const end = new AbortController();
    const response = await open("/v1/events", {}, end.signal);
    expect([response.status, response.headers.get("content-type")]).toEqual([
      200,
      "text/event-stream; charset=utf-8",
    ]);
    expect(response.headers.get("cache-control")).toBe("no-store");
    const text = await read(response, (so) => so.includes("id: 12\n") && so.endsWith("}\n\n"));
    end.abort();
    const [hello, first, reset, last] = text.split("\n\n");
    expect(hello).toBe("retry: 1000");
    expect(first).toBe(
      'id: 7\nevent: sandbox\ndata: {"id":"7","sandbox_id":"sb000000000000000000","previous_status":"running",' +
        '"status":"paused","reason":"expired","created_at":"1970-01-01T00:00:00.000Z"}',
    );
    expect(reset).toBe('id: 11\nevent: reset\ndata: {"after":"11"}');
    expect(last).toMatch(/^id: 12\nevent: sandbox\n/);
  });

  test("goes on after Last-Event-ID, and says that it lives", async () => {
    api.services.events = [event(1n), event(2n), event(3n)];
    const end = new AbortController();
    const response = await open("/v1/events", { "last-event-id": "2" }, end.signal);
    const text = await read(response, (so) => so.includes(": here"));
    end.abort();
    expect(text.match(/^id: .*$/gm)).toEqual(["id: 3"]);
  });

  test.each(["x", "-1", "1.5", "1".repeat(19), "0x1"])("refuses %j as an event's id", async (id) => {
    const { status, body } = await api.call("GET", "/v1/events", undefined, { "last-event-id": id });
    expect([status, body.error.code]).toEqual([400, "invalid_request"]);
  });

  test("needs a key, and finds no other team's sandbox", async () => {
    expect((await open("/v1/events", { "x-api-key": `rk_${"0".repeat(40)}` })).status).toBe(401);
    const made = await api.call("POST", "/v1/sandboxes", {}, { "x-api-key": api.services.keys.platform });
    expect((await open(`/v1/sandboxes/${made.body.id}/events`)).status).toBe(404);
    expect((await api.call("GET", `/v1/sandboxes/${made.body.id}/events`)).status).toBe(404);
    expect((await open("/v1/sandboxes/nothing/events")).status).toBe(404);
  });

  test("ends when its key is deleted", async () => {
    const response = await open();
    api.services.revoke(api.services.keys.member);
    expect(await read(response, () => false)).toContain("retry: 1000");
  });

  test("ends cleanly when the server closes, which does not wait for it", async () => {
    api.services.events = [event(1n)];
    const response = await open();
    const reading = read(response, () => false);
    await expect.poll(() => api.services.following).toBe(1);
    isClosed = true;
    await api[Symbol.asyncDispose]();
    expect(await reading).toContain("id: 1\n");
    await expect.poll(() => api.services.following).toBe(0);
  });

  test("frees what it held when its reader goes", async () => {
    const end = new AbortController();
    const response = await open("/v1/events", {}, end.signal);
    await read(response, (so) => so.includes("retry"));
    expect(api.services.following).toBe(1);
    end.abort();
    await expect.poll(() => api.services.following).toBe(0);
  });

  test("is cut off when its reader takes nothing, and nothing piles up meanwhile", async () => {
    let made = 0;
    api.services.endless = () => {
      made++;
      return event(BigInt(made), "x".repeat(10_000));
    };
    using connection = new RawConnection(port);
    connection.socket.pause();
    await connection.send(
      requestHead("GET", "/v1/events", { "x-api-key": api.services.keys.member, accept: EVENT_STREAM }),
    );
    await expect.poll(() => api.services.following).toBe(1);
    await expect.poll(() => api.services.following, { timeout: 30_000 }).toBe(0);
    // What the kernel's buffers hold; an endless stream that was buffered would be far beyond.
    expect(made).toBeGreaterThan(1);
    expect(made * 10_000).toBeLessThan(64 << 20);
  });
});

describe("a sandbox's events", () => {
  test("are a page of JSON, unless a stream is asked for", async () => {
    const { body } = await api.call("POST", "/v1/sandboxes", {});
    api.services.events = [event(2n), event(1n)];
    const url = `/v1/sandboxes/${body.id}/events`;
    const page = await api.call("GET", `${url}?limit=1`);
    expect(page.body.items.map(({ id }: { id: string }) => id)).toEqual(["2"]);
    const end = new AbortController();
    const response = await open(url, {}, end.signal);
    expect(await read(response, (so) => so.includes("id: 1\n"))).toContain("id: 2\n");
    end.abort();
    expect((await api.call("GET", `${url}?limit=0`)).status).toBe(400);
  });

  test("are a 204 when all of an ended one's have been read", async () => {
    const { body } = await api.call("POST", "/v1/sandboxes", {});
    await api.call("DELETE", `/v1/sandboxes/${body.id}`);
    const { status } = await open(`/v1/sandboxes/${body.id}/events`, { "last-event-id": "9" });
    expect(status).toBe(204);
  });
});
