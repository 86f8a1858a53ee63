/**
 * What `npm run release` makes runs away from this clone, and what `deploy/`
 * says of it is true: each program is there, each setting known.
 */
import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { existsSync, mkdtempSync, readFileSync, readdirSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";
import { afterAll, beforeAll, inject, test } from "vitest";
import { parseAllDocuments } from "yaml";
import { Product, repoDir } from "./product.ts";
import { startReplica } from "./replica.ts";

const exec = promisify(execFile);
const product = new Product(inject("product"));
/** The control plane's uid must be able to enter it. */
const out = mkdtempSync(join(tmpdir(), "rookery-release-"));
let release = "";

beforeAll(async () => {
  const { stdout } = await exec("node", [join(repoDir, "scripts/release.mjs"), "--out", out, "--no-archive"]);
  release = stdout.trim().split("\n").at(-1) ?? "";
  await exec("chmod", ["755", out]);
});
afterAll(() => {
  rmSync(out, { recursive: true, force: true });
});

/** All files of `deploy/`, by their path in it. */
const deployFiles = (): string[] =>
  readdirSync(join(release, "deploy"), { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile())
    .map((entry) => join(entry.parentPath, entry.name));

test("the agent starts, and the control plane says what it lacks", async () => {
  const { stdout } = await exec(join(release, "bin/rookery-agent"), ["--version"]);
  assert.equal(stdout.trim(), readFileSync(join(release, "VERSION"), "utf8").trim());
  const refused = exec(join(release, "bin/rookery-control-plane"), ["serve"], { env: {} });
  await assert.rejects(refused, ({ stderr }: { stderr: string }) => {
    assert.match(stderr, /DATABASE_URL/);
    assert.match(stderr, /ROOKERY_SECRET_KEY/);
    return true;
  });
});

test("a second replica from the release serves the same sandboxes", async () => {
  await using replica = await startReplica(product, [join(release, "bin/rookery-control-plane")]);
  const { id } = await product.api().create();
  assert.equal(await replica.api.sh(id, "echo through the other one"), "through the other one");
  await replica.api.destroy(id);
  assert.equal((await product.api().get(id)).status, "stopped");
});

test("what the units and manifests start is in the release", () => {
  const programs = deployFiles().flatMap((file) =>
    [...readFileSync(file, "utf8").matchAll(/\/opt\/rookery\/((?:bin|deploy)\/[\w./-]*\w)/g)].map(
      ([, program]) => program ?? "",
    ),
  );
  assert.ok(programs.includes("bin/rookery-agent") && programs.includes("bin/rookery-control-plane"));
  assert.deepEqual(
    programs.filter((program) => !existsSync(join(release, program))),
    [],
  );
});

test("every setting that is named is one", () => {
  const known = ["host-agent", "control-plane"]
    .map((name) => readFileSync(join(repoDir, "packages", name, "src/config.ts"), "utf8"))
    .join("\n");
  const unknown = deployFiles().flatMap((file) =>
    [...readFileSync(file, "utf8").matchAll(/^\s*(ROOKERY_[A-Z_]+)(?:=|:)/gm)]
      .map(([, name]) => name ?? "")
      .filter((name) => !known.includes(`${name}:`))
      .map((name) => `${file}: ${name}`),
  );
  assert.deepEqual(unknown, []);
});

test("manifests are YAML, and each object has a kind and a name", () => {
  const manifests = deployFiles().filter((file) => file.endsWith(".yaml"));
  assert.ok(manifests.length > 0);
  for (const file of manifests) {
    for (const document of parseAllDocuments(readFileSync(file, "utf8"), { merge: true })) {
      assert.deepEqual(document.errors, [], file);
      const object = document.toJS() as { apiVersion?: string; kind?: string; metadata?: { name?: string } };
      assert.ok(object.apiVersion && object.kind && object.metadata?.name, `${file}: ${object.kind}`);
    }
  }
});
