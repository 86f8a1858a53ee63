import assert from "node:assert/strict";
import fc from "fast-check";
import { test } from "vitest";
import { HttpError } from "../errors.ts";
import { checkSignature, signatureOf } from "./signature.ts";

const request = { path: "/x", operation: "read", username: "user", expiration: undefined } as const;

test("the signature is SHA-256 over path, operation, user, token and expiration", () => {
  // printf /x:read:user:token | openssl dgst -sha256 -binary | base64
  assert.equal(signatureOf(request, "token"), "v1_9zL+QEw6HsQRl3zkGYu0YQTVc318uVbgTqpjIko26lw");
  assert.notEqual(signatureOf({ ...request, expiration: "5" }, "token"), signatureOf(request, "token"));
});

test("a signature is good for exactly what it was made for", () => {
  const field = fc.string();
  const anyRequest = fc.record({
    path: field,
    operation: fc.constantFrom("read" as const, "write" as const),
    username: field,
    expiration: fc.option(
      fc.nat().map((seconds) => String(seconds + 1_000)),
      { nil: undefined },
    ),
  });
  fc.assert(
    fc.property(anyRequest, anyRequest, field, field, (signed, asked, token, otherToken) => {
      const signature = signatureOf(signed, token);
      checkSignature({ ...signed, signature }, token, 0);
      const text = (it: typeof signed, secret: string) =>
        [it.path, it.operation, it.username, secret, ...(it.expiration ? [it.expiration] : [])].join(":");
      if (text(signed, token) !== text(asked, token)) {
        assert.throws(() => checkSignature({ ...asked, signature }, token, 0), HttpError);
      }
      if (text(signed, token) !== text(signed, otherToken)) {
        assert.throws(() => checkSignature({ ...signed, signature }, otherToken, 0), HttpError);
      }
    }),
  );
});

test("it expires after its second, and only a plain number is an expiration", () => {
  const check = (expiration: string, nowMs: number) =>
    checkSignature(
      { ...request, expiration, signature: signatureOf({ ...request, expiration }, "t") },
      "t",
      nowMs,
    );
  check("100", 100_999);
  assert.throws(() => check("100", 101_000), { status: 401, message: "signature is already expired" });
  for (const text of ["", "1e9", "0x10", " 5", "05", "5.0", "Infinity"]) {
    assert.throws(() => check(text, 0), { status: 400 }, text);
  }
});
