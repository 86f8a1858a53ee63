/**
 * `npm test`: the checks and every suite that can run on this machine, from a
 * fresh clone on. Closes with one line: N passed, N failed, N skipped.
 *
 *   npm test                        everything
 *   npm test -- --suites unit,db    some suites
 *   npm test -- --long              the long forms too (npm run test:long)
 *
 * The host suite leaves half of two cores idle: what needs no guests runs beside it.
 */
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { parseArgs } from "node:util";
import { productPaths, repoDir } from "./bootstrap/paths.mjs";
import { ensureBundles, ensureDebianPackages, prepareTools } from "./bootstrap/prepare.mjs";
import { linesOnly, say } from "./bootstrap/progress.mjs";
import { StepError } from "./bootstrap/run.mjs";
import { check } from "./check.mjs";

/** One stage after the other; within a stage, the lanes side by side. */
const STAGES = [[["check", "unit", "db"], ["host"]], [["e2e"]]];
const SUITES = STAGES.flat(2);

const { values: flags } = parseArgs({
  options: { suites: { type: "string" }, long: { type: "boolean", default: false } },
});
const wanted = flags.suites?.split(",") ?? SUITES;
const unknown = wanted.filter((suite) => !SUITES.includes(suite));
if (unknown.length > 0) {
  console.error(`No suite ${unknown.join(", ")}; there are ${SUITES.join(", ")}.`);
  process.exit(2);
}

const total = { passed: 0, failed: 0, skipped: 0 };
/** What failed, said again at the end: a log is read from there. */
const failures = [];
try {
  const paths = productPaths();
  const { node, env } = await prepareTools(paths);
  if (wanted.some((suite) => suite === "host" || suite === "e2e")) {
    await ensureDebianPackages(env);
    await ensureBundles(paths, { node, env });
  }
  for (const stage of STAGES) {
    const lanes = stage
      .map((lane) => lane.filter((suite) => wanted.includes(suite)))
      .filter((lane) => lane.length > 0);
    const beside = lanes.length > 1;
    if (beside) linesOnly();
    const ended = await Promise.allSettled(
      lanes.map(async (lane, index) => {
        // Of suites side by side the last lane is shown as it goes, the others' whenever one has ended.
        const held = beside && index < lanes.length - 1;
        for (const suite of lane) await runSuite(suite, { node, env, held });
      }),
    );
    const broken = ended.find(({ status }) => status === "rejected");
    if (broken !== undefined) throw broken.reason;
  }
} catch (cause) {
  if (!(cause instanceof StepError)) throw cause;
  console.error(cause.message);
  total.failed += 1;
  failures.push(cause.message);
}
if (failures.length > 0) say(`\nfailed:\n${failures.map((failure) => `  ${failure}`).join("\n")}`);
say(`\n${total.passed} passed, ${total.failed} failed, ${total.skipped} skipped`);
process.exit(total.failed === 0 && total.passed > 0 ? 0 : 1);

async function runSuite(suite, { node, env, held }) {
  const isLater = held && suite !== "check";
  say(`\n== ${suite}${isLater ? " (what it says comes when it has ended)" : ""}`);
  const result =
    suite === "check"
      ? { skipped: 0, skips: [], ...(await check()) }
      : await vitest(suite, { node, env, held });
  total.passed += result.passed;
  total.failed += result.failed;
  total.skipped += result.skipped;
  for (const skip of result.skips) say(`skipped: ${skip}`);
  for (const failure of result.failures ?? []) failures.push(`${suite}: ${failure}`);
}

/** Runs one vitest project and counts its tests; a run that broke down counts as a failure. */
async function vitest(project, { node, env, held }) {
  const dir = mkdtempSync(join(tmpdir(), "rookery-test-"));
  const report = join(dir, "report.json");
  const unhandled = join(dir, "unhandled.json");
  try {
    const child = spawn(
      node,
      [
        join(repoDir, "node_modules", "vitest", "vitest.mjs"),
        "run",
        ...["--project", project],
        ...["--reporter", "default", "--reporter", "json", "--outputFile.json", report],
        ...["--reporter", join(repoDir, "scripts", "unhandled-errors-reporter.mjs")],
      ],
      {
        cwd: repoDir,
        env: { ...env, ROOKERY_UNHANDLED_ERRORS: unhandled, ...(flags.long ? { ROOKERY_LONG: "1" } : {}) },
        stdio: held ? ["inherit", "pipe", "pipe"] : "inherit",
      },
    );
    const output = [];
    child.stdout?.on("data", (chunk) => output.push(chunk));
    child.stderr?.on("data", (chunk) => output.push(chunk));
    const [code, signal] = await once(child, held ? "close" : "exit");
    if (held) say(`\n== ${project}\n${Buffer.concat(output).toString()}`);
    const ending = `vitest ended with ${signal ?? `exit code ${code}`}`;
    const parsed = readReport(report);
    if (parsed === undefined)
      return { passed: 0, failed: 1, skipped: 0, skips: [], failures: [`${ending} and no report`] };
    const tests = parsed.testResults.flatMap((file) => file.assertionResults);
    const count = (status) => tests.filter((test) => test.status === status).length;
    const failed = tests.filter((test) => test.status === "failed");
    // A file that could not be loaded, or an error outside of any test, fails the run without a failed test.
    const isBroken = code !== 0 && failed.length === 0;
    const brokenFiles = parsed.testResults.filter((file) => file.status === "failed" && file.message);
    const skips = tests.filter((test) => ["skipped", "pending", "todo"].includes(test.status));
    return {
      passed: count("passed"),
      failed: isBroken ? 1 : failed.length,
      failures: isBroken
        ? [
            `${ending} though no test failed`,
            ...brokenFiles.map(({ name, message }) => `${name}: ${message}`),
            ...(readReport(unhandled) ?? []),
          ]
        : failed.map(
            (test) => `${test.fullName}: ${test.failureMessages?.[0]?.split("\n")[0] ?? "no message"}`,
          ),
      skipped: skips.length,
      skips: skips.map((test) => test.fullName),
    };
  } finally {
    rmSync(dir, { recursive: true, force: true });
  }
}

function readReport(path) {
  try {
    return JSON.parse(readFileSync(path, "utf8"));
  } catch (cause) {
    console.error(`no report from vitest: ${cause.message}`);
    return undefined;
  }
}
