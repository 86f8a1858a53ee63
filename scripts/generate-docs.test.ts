import { readFileSync } from "node:fs";
import { expect, test } from "vitest";
import { errorsPage } from "./generate-docs.ts";

test("docs/errors.md is what the error table says (else: node scripts/generate-docs.ts)", () => {
  expect(readFileSync(new URL("../docs/errors.md", import.meta.url), "utf8")).toBe(errorsPage());
});
