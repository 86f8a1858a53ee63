/**
 * The public API as a test calls it: plain fetch, nothing of the product's code,
 * so that what is tested is what a stranger would meet.
 */
import assert from "node:assert/strict";

export interface Sandbox {
  id: string;
  status: string;
  template: string;
  host_id?: string;
  vcpus: number;
  memory_mb: number;
  disk_mb: number;
  metadata: Record<string, string>;
  created_at: string;
  expires_at?: string;
  ended_at?: string;
  error?: { code: string; message: string };
  disk_used_bytes?: number;
}

export interface ExecAnswer {
  stdout: string;
  stderr: string;
  exit_code: number;
  signal?: string;
  timed_out: boolean;
  truncated: boolean;
  duration_ms: number;
  encoding: "utf-8" | "base64";
}

export interface Answer<T> {
  status: number;
  headers: Headers;
  body: T;
}

export interface ApiError {
  error: { code: string; message: string; details?: Record<string, unknown> };
}

export class Api {
  readonly url: string;
  readonly key: string;

  constructor(url: string, key: string) {
    this.url = url;
    this.key = key;
  }

  /** One call, whatever it answers. */
  async call<T = unknown>(
    method: string,
    path: string,
    body?: unknown,
    headers: Record<string, string> = {},
  ): Promise<Answer<T>> {
    const response = await fetch(new URL(path, this.url), {
      method,
      headers: {
        "x-api-key": this.key,
        ...(body === undefined ? {} : { "content-type": "application/json" }),
        ...headers,
      },
      ...(body === undefined ? {} : { body: JSON.stringify(body) }),
      signal: AbortSignal.timeout(180_000),
    });
    const text = await response.text();
    return {
      status: response.status,
      headers: response.headers,
      body: (text === "" ? undefined : JSON.parse(text)) as T,
    };
  }

  /** One call that must answer `status`. */
  async must<T>(status: number, method: string, path: string, body?: unknown): Promise<T> {
    const answer = await this.call<T>(method, path, body);
    assert.equal(answer.status, status, `${method} ${path}: ${JSON.stringify(answer.body)}`);
    return answer.body;
  }

  create(body: Record<string, unknown> = {}): Promise<Sandbox> {
    return this.must(201, "POST", "/v1/sandboxes", body);
  }

  get(id: string): Promise<Sandbox> {
    return this.must(200, "GET", `/v1/sandboxes/${id}`);
  }

  async destroy(id: string): Promise<void> {
    await this.must(204, "DELETE", `/v1/sandboxes/${id}`);
  }

  pause(id: string): Promise<Sandbox> {
    return this.must(200, "POST", `/v1/sandboxes/${id}/pause`);
  }

  resume(id: string): Promise<Sandbox> {
    return this.must(200, "POST", `/v1/sandboxes/${id}/resume`);
  }

  exec(id: string, body: Record<string, unknown>): Promise<ExecAnswer> {
    return this.must(200, "POST", `/v1/sandboxes/${id}/exec`, body);
  }

  /** Output of a shell command that must succeed. */
  async sh(id: string, cmd: string, timeoutSec = 60): Promise<string> {
    const answer = await this.exec(id, { cmd, shell: true, timeout_sec: timeoutSec });
    assert.equal(answer.exit_code, 0, `${cmd}: ${JSON.stringify(answer)}`);
    return answer.stdout.trim();
  }

  async writeFile(id: string, path: string, content: Uint8Array<ArrayBuffer>): Promise<void> {
    const form = new FormData();
    form.append("path", path);
    form.append("file", new Blob([content]), "content");
    const response = await fetch(new URL(`/v1/sandboxes/${id}/files/write`, this.url), {
      method: "POST",
      headers: { "x-api-key": this.key },
      body: form,
    });
    assert.equal(response.status, 204, await response.text());
  }

  async readFile(id: string, path: string): Promise<Uint8Array> {
    const response = await fetch(new URL(`/v1/sandboxes/${id}/files/read`, this.url), {
      method: "POST",
      headers: { "x-api-key": this.key, "content-type": "application/json" },
      body: JSON.stringify({ path }),
    });
    assert.equal(response.status, 200);
    return response.bytes();
  }

  /** All sandboxes that are not final. */
  async live(): Promise<Sandbox[]> {
    const items: Sandbox[] = [];
    let cursor = "";
    do {
      const page = await this.must<{ items: Sandbox[]; next_cursor?: string }>(
        200,
        "GET",
        `/v1/sandboxes?limit=100${cursor}`,
      );
      items.push(...page.items);
      cursor = page.next_cursor ? `&cursor=${encodeURIComponent(page.next_cursor)}` : "";
    } while (cursor !== "");
    return items;
  }

  async destroyAll(): Promise<void> {
    await Promise.all((await this.live()).map((sandbox) => this.destroy(sandbox.id)));
  }
}

/** Waits until `probe` answers something other than undefined; names what was awaited when it gives up. */
export async function eventually<T>(
  what: string,
  timeoutMs: number,
  probe: () => T | undefined | Promise<T | undefined>,
): Promise<T> {
  const giveUpAt = Date.now() + timeoutMs;
  for (;;) {
    const answer = await probe();
    if (answer !== undefined) return answer;
    assert.ok(Date.now() < giveUpAt, `not in ${timeoutMs / 1000} s: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}
