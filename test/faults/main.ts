/**
 * `npm run faults -- --seeds N --ops N`: N fresh seeds; `--seed S [--ops N]`: one
 * again, with its log on stderr when it fails. One JSON line per seed on stdout.
 */
import { randomInt } from "node:crypto";
import { parseArgs } from "node:util";
import { startTestServer } from "../../packages/control-plane/src/db/testing/test-server.ts";
import { SERVER_SETTINGS, openInProcess } from "./in-process/form.ts";
import { Log } from "./in-process/log.ts";
import { runSeed } from "./run.ts";

const { values } = parseArgs({
  options: {
    seed: { type: "string", multiple: true },
    seeds: { type: "string", default: "10" },
    ops: { type: "string", default: "200" },
    pace: { type: "string", default: "1" },
    parallel: { type: "string", default: "4" },
    log: { type: "boolean", default: false },
  },
});
const operations = Number(values.ops);
const pace = Number(values.pace);
const seeds =
  values.seed?.map(Number) ?? Array.from({ length: Number(values.seeds) }, () => randomInt(2 ** 31));
if (![operations, pace, Number(values.parallel), ...seeds].every(Number.isSafeInteger)) {
  throw new Error("--seed, --seeds, --ops, --pace and --parallel take whole numbers");
}
const isLogged = values.log || values.seed !== undefined;

const server = await startTestServer(SERVER_SETTINGS);
let failed = 0;
try {
  await using form = await openInProcess(server);
  const left = [...seeds];
  const work = async (): Promise<void> => {
    for (let seed = left.shift(); seed !== undefined; seed = left.shift()) {
      const log = new Log({ keep: isLogged });
      try {
        const result = await runSeed({
          seed,
          operations,
          pace,
          openWorld: (parts) => form.openWorld(parts),
          log,
        });
        console.log(JSON.stringify(result));
        if (!result.ok) failed += 1;
        if (values.log || !result.ok) console.error(log.lines.join("\n"));
      } catch (cause) {
        failed += 1;
        const words = cause instanceof Error ? (cause.stack ?? cause.message) : String(cause);
        console.log(
          JSON.stringify({
            seed,
            ops: operations,
            ok: false,
            violations: [{ what: "the run broke down", words }],
          }),
        );
        if (isLogged) console.error(log.lines.join("\n"));
      }
    }
  };
  await Promise.all(Array.from({ length: Number(values.parallel) }, work));
} finally {
  await server.stop();
}
process.exit(failed === 0 ? 0 : 1);
