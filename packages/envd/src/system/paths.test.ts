import assert from "node:assert/strict";
import { posix } from "node:path";
import fc from "fast-check";
import { test } from "vitest";
import { PathError, resolvePath } from "./paths.ts";

const home = "/home/user";

test("paths mean what E2B's clients mean by them", () => {
  const cases: [string, string | undefined, string][] = [
    ["", undefined, "/home/user"],
    ["", "/work", "/work"],
    ["", "~/work", "/home/user/work"],
    ["", "sub", "/home/user/sub"],
    ["~", "/work", "/home/user"],
    ["~/x", undefined, "/home/user/x"],
    ["x/../y", "/work", "/home/user/y"],
    ["/a//b/../c", undefined, "/a//b/../c"],
  ];
  for (const [path, workdir, expected] of cases) {
    assert.equal(resolvePath(path, { home, workdir }), expected);
  }
});

test("another user's home, a NUL byte and a path beyond PATH_MAX are refused", () => {
  for (const path of ["~root", "~root/x", "a\0b", "/\0", `/${"x".repeat(4095)}`, "ä".repeat(2048)]) {
    assert.throws(() => resolvePath(path, { home }), PathError, JSON.stringify(path.slice(0, 10)));
  }
  assert.equal(resolvePath(`/${"x".repeat(4094)}`, { home }).length, 4095);
});

test("whatever a client writes, the result is absolute, free of NUL and bounded, or an error", () => {
  fc.assert(
    fc.property(
      fc.string({ unit: "binary", maxLength: 60 }),
      fc.option(fc.string(), { nil: undefined }),
      (path, workdir) => {
        let resolved: string;
        try {
          resolved = resolvePath(path, { home, workdir });
        } catch (error) {
          assert.ok(error instanceof PathError);
          return;
        }
        assert.ok(posix.isAbsolute(resolved));
        assert.ok(!resolved.includes("\0"));
        assert.ok(Buffer.byteLength(resolved) <= 4095);
        if (path.startsWith("/")) assert.equal(resolved, path);
        else if (path !== "") assert.equal(resolved, posix.join(home, path.replace(/^~/, "")));
      },
    ),
  );
});
