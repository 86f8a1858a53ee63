/** The .proto files pass their linter, and the committed generated code is what they give. */
import { spawnSync } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

const cwd = "packages/protocol";
const fresh = mkdtempSync(join(tmpdir(), "rookery-protocol-"));
try {
  must("buf", ["lint"], cwd);
  must("buf", ["generate", "--output", fresh], cwd);
  must("diff", ["-r", join(fresh, "src", "gen"), join(cwd, "src", "gen")], ".");
} finally {
  rmSync(fresh, { recursive: true });
}

function must(program, args, dir) {
  const { status, stdout, stderr } = spawnSync(program, args, { cwd: dir, encoding: "utf8" });
  if (status === 0) return;
  console.error(`${program} ${args.join(" ")}\n${stdout}${stderr}`);
  if (program === "diff") console.error("Generate anew: npm run generate");
  process.exitCode = 1;
  throw new Error(`${program} failed`);
}
