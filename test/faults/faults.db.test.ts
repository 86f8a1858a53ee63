/**
 * A bounded part of the fault suite: seeds that once found something, and fresh
 * ones. A failing seed is in the failure's words; `npm run faults -- --seed S
 * --ops N` plays it again.
 */
import { randomInt } from "node:crypto";
import { expect, inject, test } from "vitest";
import { TEMPLATE_DATABASE } from "../../packages/control-plane/src/db/testing/test-server.ts";
import { openInProcess } from "./in-process/form.ts";
import { Log } from "./in-process/log.ts";
import { runSeed } from "./run.ts";

const isLong = process.env["ROOKERY_LONG"] === "1";
const OPERATIONS = isLong ? 500 : 60;
const FRESH = isLong ? 997 : 3;
const AT_ONCE = 3;
/** Other suites are at work beside this one. */
const PACE = 3;

const fixed = [1, 2, 3];
const fresh = Array.from({ length: FRESH }, () => randomInt(2 ** 31));

test(
  "whatever fails, nothing is lost, doubled or leaked",
  { timeout: isLong ? 4 * 3_600_000 : 240_000 },
  async () => {
    const server = { socketDir: inject("postgresSocketDir"), template: TEMPLATE_DATABASE };
    await using form = await openInProcess(server);
    const left = [...fixed, ...fresh];
    const failed: unknown[] = [];
    const work = async (): Promise<void> => {
      for (let seed = left.shift(); seed !== undefined; seed = left.shift()) {
        const log = new Log({ keep: false });
        const { ok, ...result } = await runSeed({
          seed,
          operations: OPERATIONS,
          pace: PACE,
          openWorld: (parts) => form.openWorld(parts),
          log,
        });
        if (!ok) failed.push(result);
      }
    };
    await Promise.all(Array.from({ length: AT_ONCE }, work));
    expect(failed).toEqual([]);
  },
);
