import pino from "pino";
import { expect, test } from "vitest";
import { parseConfig } from "./config.ts";

const needed = { DATABASE_URL: "postgresql://rookery@localhost/rookery", ROOKERY_SECRET_KEY: "k".repeat(32) };

test("every level that the log knows can be set, and no other", () => {
  for (const level of [...Object.keys(pino.levels.values), "silent"]) {
    expect(parseConfig({ ...needed, ROOKERY_LOG_LEVEL: level }).logLevel).toBe(level);
  }
  expect(() => parseConfig({ ...needed, ROOKERY_LOG_LEVEL: "loud" })).toThrow(/ROOKERY_LOG_LEVEL/);
});
