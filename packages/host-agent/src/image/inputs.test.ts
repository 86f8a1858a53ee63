import assert from "node:assert/strict";
import { chmod, mkdir, mkdtemp, readFile, rename, utimes, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, test } from "vitest";
import { ENVD_NODE_OPTIONS } from "../../../envd/build.mjs";
import { removeTree } from "../host/atomic-file.ts";
import { parsePrintedUris } from "./apt-archive.ts";
import { IMAGE_KERNEL_ARGS, guestNetworkArgs } from "./cmdline.ts";
import { imageDefinition } from "./definitions.ts";
import { hashFileCached, hashOf, hashTree } from "./input-hash.ts";

const GUEST_FILES_DIR = join(import.meta.dirname, "../../../guest-image");
const signal = new AbortController().signal;
let dir: string;

beforeEach(async () => {
  dir = await mkdtemp(join(tmpdir(), "rookery-inputs-"));
});
afterEach(() => removeTree(dir));

test("what apt prints becomes packages, in the order of their names", () => {
  const hash = "3d3fdbe91d4660c873e14b092c213fe81c1da6362daa236eb25d0171eb108744";
  const output = `'scheme:tini_0.19.0-1+b3_amd64.deb' tini_0.19.0-1+b3_amd64.deb 267204 SHA256:${hash}
'scheme:a/busybox-static_1%3a1.35.0-4_amd64.deb' busybox-static_1%3a1.35.0-4_amd64.deb 928188 SHA256:${hash}
`;
  assert.deepEqual(parsePrintedUris(output), [
    { fileName: "busybox-static_1%3a1.35.0-4_amd64.deb", sizeBytes: 928_188, sha256: hash },
    { fileName: "tini_0.19.0-1+b3_amd64.deb", sizeBytes: 267_204, sha256: hash },
  ]);
});

test("a package without a SHA-256 is refused", () => {
  assert.throws(() =>
    parsePrintedUris("'scheme:a_1_amd64.deb' a_1_amd64.deb 1 MD5Sum:8e7e741807b1e1939df8f58323affdcb\n"),
  );
});

test("a file name that would leave its directory is refused", () => {
  assert.throws(() => parsePrintedUris(`'scheme:x' ../a_1_amd64.deb 1 SHA256:${"0".repeat(64)}\n`));
});

test("the order of inputs does not count, each name and value does", () => {
  assert.equal(hashOf({ a: "1", b: "2" }), hashOf({ b: "2", a: "1" }));
  assert.notEqual(hashOf({ a: "1", b: "2" }), hashOf({ a: "12", b: "" }));
  assert.notEqual(hashOf({ a: "1" }), hashOf({ b: "1" }));
});

test("a tree's hash follows contents, names and executability, not times", async () => {
  const tree = join(dir, "tree");
  await mkdir(join(tree, "sub"), { recursive: true });
  const file = join(tree, "sub/file");
  await writeFile(file, "one", { mode: 0o644 });
  const seen = [await hashTree(tree, signal)];
  await utimes(file, 1, 1);
  assert.equal(await hashTree(tree, signal), seen[0]);
  await writeFile(file, "two");
  seen.push(await hashTree(tree, signal));
  await chmod(file, 0o755);
  seen.push(await hashTree(tree, signal));
  await rename(file, join(tree, "file"));
  seen.push(await hashTree(tree, signal));
  assert.equal(new Set(seen).size, 4);
});

test("a kept hash counts only for the file that it was taken of", async () => {
  const file = join(dir, "node");
  const cache = join(dir, "cache.json");
  await writeFile(file, "one");
  const first = await hashFileCached(file, cache, signal);
  assert.equal(await hashFileCached(file, cache, signal), first);
  await writeFile(join(dir, "new"), "two");
  await rename(join(dir, "new"), file);
  assert.notEqual(await hashFileCached(file, cache, signal), first);
  await writeFile(cache, "not json");
  assert.notEqual(await hashFileCached(file, cache, signal), first);
});

test("an image that nobody defined is not found", () => {
  assert.throws(() => imageDefinition("windows"), { code: "template_not_found" });
});

test("the guest's init is told its network by the kernel's command line", () => {
  assert.equal(
    guestNetworkArgs({
      addressCidr: "169.254.0.21/30",
      gateway: "169.254.0.22",
      nameservers: ["9.9.9.9", "1.1.1.1"],
    }),
    "rookery.address=169.254.0.21/30 rookery.gateway=169.254.0.22 rookery.dns=9.9.9.9,1.1.1.1",
  );
  assert.equal(
    guestNetworkArgs({ addressCidr: "10.0.2.15/24", gateway: "10.0.2.2", nameservers: [] }),
    "rookery.address=10.0.2.15/24 rookery.gateway=10.0.2.2",
  );
});

test("the image's own kernel arguments leave console and TSC to the driver", () => {
  assert.ok(IMAGE_KERNEL_ARGS.includes("init_on_free=1"));
  assert.ok(IMAGE_KERNEL_ARGS.includes("no_timer_check"));
  assert.ok(!IMAGE_KERNEL_ARGS.some((arg) => /^(console|tsc)/.test(arg)));
});

test("the guest starts envd with the options that envd asks for", async () => {
  const loop = await readFile(join(GUEST_FILES_DIR, "root/usr/lib/rookery/keep-envd"), "utf8");
  assert.ok(
    loop.includes(`/usr/lib/rookery/node ${ENVD_NODE_OPTIONS.join(" ")} /usr/lib/rookery/envd.mjs`),
    loop,
  );
});
