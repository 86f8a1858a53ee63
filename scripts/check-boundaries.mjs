/**
 * Who may import whom (.dependency-cruiser.mjs). It fails too when the tool saw
 * fewer modules than there are: with a compiler that it does not know, it would
 * see none and be content.
 */
import { spawnSync } from "node:child_process";
import { globSync } from "node:fs";

const sources = globSync("packages/*/src/**/*.ts", {
  exclude: (name) => name === "gen" || name === "node_modules",
});
const { stdout, stderr, status } = spawnSync(
  "depcruise",
  ["--config", ".dependency-cruiser.mjs", "--output-type", "json", "packages"],
  { encoding: "utf8", maxBuffer: 256 << 20 },
);
if (stdout === "") {
  console.error(stderr);
  process.exit(status || 1);
}
const { modules, summary } = JSON.parse(stdout);
const seen = new Set(modules.map((module) => module.source));
const unseen = sources.filter((source) => !seen.has(source) && !source.includes("/gen/"));
for (const { rule, from, to } of summary.violations)
  console.error(`${rule.severity} ${rule.name}: ${from} → ${to}`);
for (const source of unseen) console.error(`not seen by the boundary check: ${source}`);
console.log(
  `${seen.size} modules, ${summary.totalDependenciesCruised} arrows, ${summary.violations.length} violations`,
);
process.exit(summary.error > 0 || unseen.length > 0 ? 1 : 0);
