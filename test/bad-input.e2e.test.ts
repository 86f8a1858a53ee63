/** Bad input to the whole product: a clear typed error each time, and a product that is healthy afterwards. */
import assert from "node:assert/strict";
import { request } from "node:http";
import { afterAll, beforeAll, describe, inject, test } from "vitest";
import type { Api, ApiError, Sandbox } from "./api.ts";
import { Product } from "./product.ts";

const product = new Product(inject("product"));
let api: Api;
let sandbox: Sandbox;

beforeAll(async () => {
  api = product.api();
  sandbox = await api.create();
});
afterAll(async () => {
  assert.equal(await api.sh(sandbox.id, "echo healthy"), "healthy");
  await api.destroyAll();
});

async function refused(
  status: number,
  code: string,
  method: string,
  path: string,
  body?: unknown,
): Promise<ApiError> {
  const answer = await api.call<ApiError>(method, path, body);
  assert.equal(answer.status, status, JSON.stringify(answer.body));
  assert.equal(answer.body.error.code, code);
  assert.ok(answer.body.error.message.length > 0);
  assert.doesNotMatch(JSON.stringify(answer.body), /\bat .*\.(m?js|ts):\d+|node_modules/, "a stack trace");
  return answer.body;
}

describe("the product refuses", () => {
  test("unknown and malformed ids with 404", async () => {
    for (const id of ["sb000000000000000000", "nope", "sb%00", "..%2f..", "a".repeat(500)]) {
      await refused(404, "not_found", "GET", `/v1/sandboxes/${id}`);
      await refused(404, "not_found", "POST", `/v1/sandboxes/${id}/exec`, { cmd: "true" });
    }
    await refused(404, "template_not_found", "POST", "/v1/sandboxes", { template: "no-such-template" });
    await refused(404, "not_found", "DELETE", "/v1/snapshots/no-such-snapshot");
  });

  test("wrong states with 409 and the present status", async () => {
    const error = await refused(409, "wrong_state", "POST", `/v1/sandboxes/${sandbox.id}/resume`);
    assert.equal(error.error.details?.["status"], "running");
  });

  test("schema violations with 400 and the field's name", async () => {
    const cases: [Record<string, unknown>, string][] = [
      [{ vcpus: 3 }, "vcpus"],
      [{ memory_mb: "512" }, "memory_mb"],
      [{ timeout_sec: 5 }, "timeout_sec"],
      [{ on_timeout: "explode" }, "on_timeout"],
      [{ metadata: { key: 1 } }, "metadata"],
      [
        { metadata: Object.fromEntries(Array.from({ length: 10_000 }, (_, i) => [`k${i}`, "v"])) },
        "metadata",
      ],
      [{ env: { "a\0b": "x" } }, "env"],
      [{ no_such_field: true }, "no_such_field"],
    ];
    for (const [body, field] of cases) {
      const error = await refused(400, "invalid_request", "POST", "/v1/sandboxes", body);
      assert.ok(String(error.error.details?.["field"]).startsWith(field), JSON.stringify(error));
    }
    await refused(400, "invalid_request", "POST", `/v1/sandboxes/${sandbox.id}/exec`, { cmd: "a\0b" });
    await refused(400, "invalid_request", "POST", `/v1/sandboxes/${sandbox.id}/exec`, {});
  });

  test("paths outside of the guest's rules", async () => {
    await refused(400, "invalid_request", "POST", `/v1/sandboxes/${sandbox.id}/files/read`, {
      path: "/a\0b",
    });
    await refused(404, "file_not_found", "POST", `/v1/sandboxes/${sandbox.id}/files/read`, {
      path: "/no/such",
    });
    await refused(400, "invalid_path", "POST", `/v1/sandboxes/${sandbox.id}/files/read`, { path: "/etc" });
  });

  test("a body of 1 GB, long before it has all of it", async () => {
    const { status, sent } = await new Promise<{ status: number; sent: number }>((resolve, reject) => {
      const url = new URL("/v1/sandboxes", api.url);
      const call = request(url, {
        method: "POST",
        headers: {
          "x-api-key": api.key,
          "content-type": "application/json",
          "content-length": 1_000_000_000,
        },
      });
      let bytes = 0;
      const zeros = Buffer.alloc(65_536, 0x20);
      const feed = (): void => {
        while (bytes < 1_000_000_000 && !call.destroyed) {
          bytes += zeros.length;
          if (!call.write(zeros)) {
            call.once("drain", feed);
            return;
          }
        }
      };
      call.on("response", (response) => {
        response.resume();
        resolve({ status: response.statusCode ?? 0, sent: bytes });
        call.destroy();
      });
      call.on("error", reject);
      feed();
    });
    assert.equal(status, 413);
    assert.ok(sent < 100_000_000, `${sent} bytes were taken`);
  });

  test("malformed multipart", async () => {
    for (const [contentType, body] of [
      ["multipart/form-data", "no boundary"],
      ["multipart/form-data; boundary=x", "--x\r\nnot a part"],
      [
        "multipart/form-data; boundary=x",
        '--x\r\nContent-Disposition: form-data; name="path"\r\n\r\n/tmp/a\r\n',
      ],
    ] as const) {
      const response = await fetch(new URL(`/v1/sandboxes/${sandbox.id}/files/write`, api.url), {
        method: "POST",
        headers: { "x-api-key": api.key, "content-type": contentType },
        body,
      });
      assert.equal(response.status, 400, contentType);
      assert.equal(((await response.json()) as ApiError).error.code, "invalid_request");
    }
  });

  test("keys that are none, and what belongs to another team", async () => {
    const stranger = await fetch(new URL("/v1/sandboxes", api.url), {
      headers: { "x-api-key": `rk_${"0".repeat(40)}` },
    });
    assert.equal(stranger.status, 401);
    const { key } = await api.must<{ key: string }>(201, "POST", "/v1/teams", { name: `team-${Date.now()}` });
    const other = await fetch(new URL(`/v1/sandboxes/${sandbox.id}`, api.url), {
      headers: { "x-api-key": key },
    });
    assert.equal(other.status, 404);
  });
});
