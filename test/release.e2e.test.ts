/**
 * What `npm run release` makes runs away from this clone, and what `deploy/`
 * says of it is true: each program is there, each setting known.
 */
import assert from "node:assert/strict";
import { execFile, spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync, mkdtempSync, readFileSync, readdirSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";
import { afterAll, beforeAll, inject, test } from "vitest";
import { parseAllDocuments } from "yaml";
import { Api, eventually } from "./api.ts";
import { Product, freePort, repoDir } from "./product.ts";

const exec = promisify(execFile);
const product = new Product(inject("product"));
/** Below /var/tmp: the control plane's uid must be able to enter it. */
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
  const { dataDir } = product.options;
  const { secret_key: secretKey } = JSON.parse(readFileSync(join(dataDir, "secrets.json"), "utf8")) as {
    secret_key: string;
  };
  const port = await freePort();
  const replica = spawn(join(release, "bin/rookery-control-plane"), ["serve"], {
    cwd: "/",
    env: {
      DATABASE_URL: databaseUrlOf(product.pid("control-plane")),
      ROOKERY_SECRET_KEY: secretKey,
      ROOKERY_PORT: String(port),
      ROOKERY_LOG_LEVEL: "error",
    },
    ...uidOf(product.pid("control-plane")),
    stdio: ["ignore", "inherit", "inherit"],
  });
  try {
    const { key } = product.api();
    const api = new Api(`http://127.0.0.1:${port}`, key);
    await eventually("the replica is ready", 60_000, () =>
      fetch(`http://127.0.0.1:${port}/readyz`).then(
        ({ ok }) => (ok ? true : undefined),
        () => undefined,
      ),
    );
    const { id } = await product.api().create();
    assert.equal(await api.sh(id, "echo through the other one"), "through the other one");
    await api.destroy(id);
    assert.equal((await product.api().get(id)).status, "stopped");
  } finally {
    replica.kill("SIGTERM");
    if (replica.exitCode === null && replica.signalCode === null) await once(replica, "exit");
  }
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

function databaseUrlOf(pid: number): string {
  const environment = readFileSync(`/proc/${pid}/environ`, "utf8").split("\0");
  const entry = environment.find((line) => line.startsWith("DATABASE_URL="));
  assert.ok(entry, "the control plane has no DATABASE_URL");
  return entry.slice("DATABASE_URL=".length);
}

/** The database takes its owner's connections alone. */
function uidOf(pid: number): { uid: number; gid: number } {
  const status = readFileSync(`/proc/${pid}/status`, "utf8");
  const id = (name: string): number => Number(new RegExp(`^${name}:\\s+(\\d+)`, "m").exec(status)?.[1]);
  return { uid: id("Uid"), gid: id("Gid") };
}
