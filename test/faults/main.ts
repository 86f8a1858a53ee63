/**
 * `npm run faults -- --seeds N --ops N`: N fresh seeds; `--seed S [--ops N]`: one
 * again, with its log on stderr when it fails. One JSON line per seed on stdout.
 *
 * `--form processes` plays the same with real processes (needs root); there the
 * log of a failed seed is kept in .rookery/faults, since its timing never comes again.
 */
import { randomInt } from "node:crypto";
import { mkdirSync, writeFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { parseArgs } from "node:util";
import { type Form, openForm } from "./forms.ts";
import { Log } from "./in-process/log.ts";
import { enclosureRoot, runEnclosed } from "./real-processes/enclosure.ts";
import { runSeed } from "./run.ts";

const { values } = parseArgs({
  options: {
    form: { type: "string", default: "in-process" },
    seed: { type: "string", multiple: true },
    seeds: { type: "string", default: "10" },
    ops: { type: "string", default: "200" },
    pace: { type: "string" },
    parallel: { type: "string" },
    log: { type: "boolean", default: false },
  },
});
const isReal = values.form === "processes";
if (!isReal && values.form !== "in-process") throw new Error("--form is in-process or processes");
const operations = Number(values.ops);
const pace = Number(values.pace ?? (isReal ? 5 : 1));
const parallel = Number(values.parallel ?? (isReal ? 1 : 4));
const seeds =
  values.seed?.map(Number) ?? Array.from({ length: Number(values.seeds) }, () => randomInt(2 ** 31));
if (![operations, pace, parallel, ...seeds].every(Number.isSafeInteger)) {
  throw new Error("--seed, --seeds, --ops, --pace and --parallel take whole numbers");
}
if (isReal && enclosureRoot() === undefined) process.exit(await runEnclosed());

const isLogged = values.log || values.seed !== undefined;
const left = [...seeds];
let failed = 0;

/** Prints the line of one seed; returns whether all was well. */
async function playOne(form: Form, seed: number, slot: number): Promise<boolean> {
  const log = new Log({ keep: isLogged || isReal });
  let isOk = false;
  try {
    const openWorld = (parts: Parameters<Form["openWorld"]>[0]) => form.openWorld(parts, slot);
    const result = await runSeed({ seed, operations, pace, openWorld, log });
    console.log(JSON.stringify(result));
    isOk = result.ok;
  } catch (cause) {
    const words = cause instanceof Error ? (cause.stack ?? cause.message) : String(cause);
    const violations = [{ what: "the run broke down", words }];
    console.log(JSON.stringify({ seed, ops: operations, ok: false, violations }));
  }
  if (values.log || (isLogged && !isOk)) console.error(log.lines.join("\n"));
  if (isReal && !isOk) keepLog(seed, log);
  return isOk;
}

function keepLog(seed: number, log: Log): void {
  const dir = resolve(import.meta.dirname, "../../.rookery/faults");
  mkdirSync(dir, { recursive: true });
  const path = join(dir, `${seed}.log`);
  writeFileSync(path, `${log.lines.join("\n")}\n`);
  console.error(`${seed}: ${path}`);
}

{
  await using form = await openForm(isReal ? "processes" : "in-process", parallel);
  const work = async (_: unknown, slot: number): Promise<void> => {
    for (let seed = left.shift(); seed !== undefined; seed = left.shift()) {
      if (!(await playOne(form, seed, slot))) failed += 1;
    }
  };
  await Promise.all(Array.from({ length: parallel }, work));
}
process.exit(failed === 0 ? 0 : 1);
