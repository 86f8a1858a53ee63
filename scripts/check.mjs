/**
 * `npm run check`: format, lint, types, boundaries, dead code, wire definitions.
 * Everything is run, also after a failure, and each failure shown.
 */
import { productPaths, repoDir } from "./bootstrap/paths.mjs";
import { prepareTools } from "./bootstrap/prepare.mjs";
import { step } from "./bootstrap/progress.mjs";
import { StepError, run } from "./bootstrap/run.mjs";

const CHECKS = [
  ["format (oxfmt)", ["oxfmt", "--check", "."]],
  ["lint (oxlint, type-aware)", ["oxlint", "--type-aware", "--deny-warnings"]],
  ["types (tsc)", ["tsc", "-p", "."]],
  ["boundaries (dependency-cruiser)", ["node", "scripts/check-boundaries.mjs"]],
  ["dead code (knip)", ["knip", "--no-progress"]],
  ["wire definitions (buf lint, generated code)", ["node", "scripts/check-protocol.mjs"]],
];

/** @returns {Promise<{passed: number, failed: number}>} */
export async function check() {
  const { env } = await prepareTools(productPaths());
  let failed = 0;
  for (const [title, argv] of CHECKS) {
    try {
      await step(title, () => run(argv, { cwd: repoDir, env }));
    } catch (cause) {
      if (!(cause instanceof StepError)) throw cause;
      console.error(cause.message);
      failed += 1;
    }
  }
  return { passed: CHECKS.length - failed, failed };
}

if (process.argv[1] === new URL(import.meta.url).pathname) {
  const { failed } = await check();
  process.exit(failed === 0 ? 0 : 1);
}
