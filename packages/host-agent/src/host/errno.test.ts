import { expect, test } from "vitest";
import { comesFromFullDisk } from "./errno.ts";

const errno = (code: string) => Object.assign(new Error(code), { code });

test("a full disk is found through whatever wraps it", () => {
  expect(comesFromFullDisk(errno("ENOSPC"))).toBe(true);
  expect(comesFromFullDisk(new Error("a", { cause: new Error("b", { cause: errno("EDQUOT") }) }))).toBe(true);
  expect(comesFromFullDisk(new Error("a", { cause: errno("EIO") }))).toBe(false);
  expect(comesFromFullDisk("ENOSPC")).toBe(false);
});

test("causes in a circle are no way to hang", () => {
  const error = new Error("a");
  error.cause = error;
  expect(comesFromFullDisk(error)).toBe(false);
});
