import { Code } from "@connectrpc/connect";
import { ErrorInfoSchema } from "@rookery/protocol/hostagent";
import { expect, test } from "vitest";
import { toConnectError } from "./errors.ts";

test("a full disk has its own code, and no path in its words", () => {
  const full = Object.assign(new Error("ENOSPC: write '/secret'"), { code: "ENOSPC" });
  const error = toConnectError(new Error("/secret", { cause: full }));
  expect(error.findDetails(ErrorInfoSchema)).toMatchObject([{ code: "out_of_disk" }]);
  expect(error.code).not.toBe(Code.Internal);
  expect(error.message).not.toContain("secret");
});
