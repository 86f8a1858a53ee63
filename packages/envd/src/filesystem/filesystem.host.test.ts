import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import {
  chmodSync,
  existsSync,
  mkdirSync,
  readFileSync,
  statSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { Code, ConnectError, createClient } from "@connectrpc/connect";
import type { Client } from "@connectrpc/connect";
import { createConnectTransport } from "@connectrpc/connect-node";
import { filesystem as wire } from "@rookery/protocol/envd";
import { afterAll, beforeAll, describe, test } from "vitest";
import { growFileSystem } from "../init/apply-init.ts";
import { openNative } from "../system/native.ts";
import { ACCESS_TOKEN, EnvdProcess } from "../testing/envd-process.ts";

let envd: EnvdProcess;
let folder: string;
beforeAll(async () => {
  envd = await EnvdProcess.start();
  assert.equal((await envd.init()).status, 204);
  folder = join(envd.directory, "tree");
  mkdirSync(folder);
});
afterAll(async () => {
  envd.assertAlive();
  await envd[Symbol.asyncDispose]();
});

function connect(useBinaryFormat: boolean): Client<typeof wire.Filesystem> {
  return createClient(
    wire.Filesystem,
    createConnectTransport({
      baseUrl: envd.url,
      httpVersion: "1.1",
      useBinaryFormat,
      interceptors: [
        (next) => (request) => {
          request.header.set("x-access-token", ACCESS_TOKEN);
          return next(request);
        },
      ],
    }),
  );
}

async function codeOf(promise: Promise<unknown>): Promise<Code> {
  try {
    await promise;
  } catch (error) {
    return ConnectError.from(error).code;
  }
  throw new assert.AssertionError({ message: "it was not rejected" });
}

describe.each([
  { codec: "JSON", binary: false },
  { codec: "binary", binary: true },
])("filesystem.Filesystem in $codec", ({ binary, codec }) => {
  test("Stat tells what a file is", async () => {
    const path = join(folder, `stat-${codec}`);
    writeFileSync(path, "12345");
    chmodSync(path, 0o751);
    const { entry } = await connect(binary).stat({ path });
    assert.deepEqual(
      [entry!.name, entry!.type, entry!.path, entry!.size, entry!.mode, entry!.permissions],
      [`stat-${codec}`, wire.FileType.FILE, path, 5n, 0o751, "-rwxr-x--x"],
    );
    assert.deepEqual([entry!.owner, entry!.group, entry!.symlinkTarget], ["root", "root", undefined]);
    const { seconds, nanos } = entry!.modifiedTime!;
    const mtimeMs = Number(seconds) * 1000 + nanos / 1e6;
    assert.ok(Math.abs(mtimeMs - statSync(path).mtimeMs) < 1);
    assert.equal(await codeOf(connect(binary).stat({ path: "/no/such" })), Code.NotFound);
  });

  test("a link shows its target's type and mode, and where that really is", async () => {
    const target = join(folder, `real-${codec}`);
    mkdirSync(target, { mode: 0o700 });
    const link = join(folder, `link-${codec}`);
    symlinkSync(target, link);
    symlinkSync(link, `${link}-2`);
    const { entry } = await connect(binary).stat({ path: `${link}-2` });
    assert.deepEqual(
      [entry!.type, entry!.mode, entry!.permissions, entry!.symlinkTarget],
      [wire.FileType.DIRECTORY, 0o700, "Lrwxrwxrwx", target],
    );
    symlinkSync("/no/such", `${link}-broken`);
    const broken = await connect(binary).stat({ path: `${link}-broken` });
    assert.deepEqual([broken.entry!.type, broken.entry!.mode], [wire.FileType.UNSPECIFIED, 0]);
  });

  test("MakeDir makes parents for the user, and says what is in its way", async () => {
    const client = connect(binary);
    const path = join(folder, `made-${codec}/a/b`);
    const { entry } = await client.makeDir({ path });
    assert.deepEqual([entry!.path, entry!.owner, entry!.mode], [path, "nobody", 0o755]);
    assert.equal(statSync(join(folder, `made-${codec}`)).uid, 65_534);
    assert.equal(await codeOf(client.makeDir({ path })), Code.AlreadyExists);
    writeFileSync(join(path, "file"), "");
    assert.equal(await codeOf(client.makeDir({ path: join(path, "file") })), Code.InvalidArgument);
    assert.equal(await codeOf(client.makeDir({ path: join(path, "file/below") })), Code.InvalidArgument);
  });

  test("Move makes the parents of where it goes, also to another file system", async () => {
    const client = connect(binary);
    const source = join(folder, `moved-${codec}`);
    writeFileSync(source, "x", { mode: 0o640 });
    const destination = join(folder, `to-${codec}/here`);
    const { entry } = await client.move({ source, destination });
    assert.deepEqual([entry!.path, entry!.mode, existsSync(source)], [destination, 0o640, false]);
    assert.equal(await codeOf(client.move({ source, destination })), Code.NotFound);

    const memory = join(folder, `tmpfs-${codec}`);
    mkdirSync(memory);
    execFileSync("nsenter", ["-t", String(envd.pid), "-m", "mount", "-t", "tmpfs", "t", memory]);
    const far = await client.move({ source: destination, destination: join(memory, "far") });
    assert.deepEqual([far.entry!.mode, far.entry!.owner], [0o640, "root"]);
    assert.ok(!existsSync(destination));
  });

  test("ListDir walks in lexical order to its depth, and follows no link but the first", async () => {
    const client = connect(binary);
    const root = join(folder, `walk-${codec}`);
    for (const path of ["b/inner/deep", "a", "c"]) mkdirSync(join(root, path), { recursive: true });
    writeFileSync(join(root, "B"), "");
    symlinkSync(join(root, "b"), join(root, "d"));
    const names = async (path: string, depth: number) =>
      (await client.listDir({ path, depth })).entries.map((entry) => entry.path.slice(path.length + 1));
    assert.deepEqual(await names(root, 0), ["B", "a", "b", "c", "d"]);
    assert.deepEqual(await names(root, 2), ["B", "a", "b", "b/inner", "c", "d"]);
    assert.deepEqual(await names(join(root, "d"), 3), ["inner", "inner/deep"]);
    assert.equal(await codeOf(client.listDir({ path: join(root, "none") })), Code.NotFound);
    assert.equal(await codeOf(client.listDir({ path: join(root, "B") })), Code.InvalidArgument);
    assert.equal(await codeOf(client.listDir({ path: root, depth: 65 })), Code.InvalidArgument);
  });

  test("Remove takes a whole tree, and what is not there is gone already", async () => {
    const client = connect(binary);
    const root = join(folder, `gone-${codec}`);
    mkdirSync(join(root, "a/b"), { recursive: true });
    await client.remove({ path: root });
    assert.ok(!existsSync(root));
    await client.remove({ path: root });
  });

  test("paths are the user's, and bad ones are invalid", async () => {
    const client = connect(binary);
    assert.equal((await client.stat({ path: "" })).entry!.path, "/tmp");
    for (const path of ["~root", "a\0b", `/${"x".repeat(5000)}`]) {
      assert.equal(await codeOf(client.stat({ path })), Code.InvalidArgument);
    }
  });

  test("watches have their place in the protocol", async () => {
    assert.equal(await codeOf(connect(binary).createWatcher({ path: "/tmp" })), Code.Unimplemented);
    const watching = (async () => {
      for await (const _event of connect(binary).watchDir({ path: "/tmp" })) assert.fail("an event");
    })();
    assert.equal(await codeOf(watching), Code.Unimplemented);
  });
});

test("a request of another protocol, method or type is refused and answered", async () => {
  const path = "/filesystem.Filesystem/Stat";
  const post = (type: string, body = "{}") =>
    envd.fetch(path, { method: "POST", headers: { "content-type": type }, body });
  assert.equal((await post("application/grpc")).status, 415);
  assert.equal((await post("application/connect+json")).status, 415);
  assert.equal((await envd.fetch(path)).status, 405);
  assert.equal((await post("application/json", "not json")).status, 400);
  assert.equal((await post("application/proto", "\xff\xff")).status, 400);
  assert.equal((await envd.fetch("/filesystem.Filesystem/None", { method: "POST" })).status, 404);
  const large = await post("application/json", `{"path":"${"x".repeat(9_000_000)}"}`);
  assert.equal(large.status, 429);
  assert.equal((await post("application/json", '{"path":"/","newer":1}')).status, 200);
});

test("metrics have the protocol's fields", async () => {
  const metrics = (await (await envd.fetch("/metrics")).json()) as Record<string, number>;
  assert.deepEqual(Object.keys(metrics), [
    "ts",
    "cpu_count",
    "cpu_used_pct",
    "mem_total",
    "mem_used",
    "mem_cache",
    "mem_total_mib",
    "mem_used_mib",
    "disk_used",
    "disk_total",
  ]);
  assert.ok(metrics["mem_used"]! > 0 && metrics["disk_used"]! > 0);
});

/** CAP_SYS_RESOURCE (linux/capability.h) is bit 24; containers often lack it. */
const mayResize =
  (BigInt(`0x${/CapEff:\t(\w+)/.exec(readFileSync("/proc/self/status", "utf8"))![1]}`) & (1n << 24n)) !== 0n;

test("a mounted ext4 grows to its device without a program", (context) => {
  context.skip(!mayResize, "resizing a mounted ext4 needs CAP_SYS_RESOURCE");
  const image = join(envd.directory, "ext4");
  const mountPoint = join(envd.directory, "mounted");
  mkdirSync(mountPoint);
  writeFileSync(image, "");
  truncateSync(image, 32 << 20);
  execFileSync("mkfs.ext4", ["-q", image]);
  truncateSync(image, 96 << 20);
  const loop = execFileSync("losetup", ["--find", "--show", image]).toString().trim();
  try {
    execFileSync("mount", [loop, mountPoint]);
    try {
      const koffi = createRequire(import.meta.url).resolve(
        `@koromix/koffi-linux-${process.arch}/package.json`,
      );
      growFileSystem(mountPoint, openNative(join(koffi, `../linux_${process.arch}/koffi.node`)));
      const blocks = execFileSync("stat", ["-f", "-c", "%b", mountPoint]).toString();
      assert.ok(Number(blocks) * 4096 > 80 << 20 || Number(blocks) * 1024 > 80 << 20, blocks);
    } finally {
      execFileSync("umount", [mountPoint]);
    }
  } finally {
    execFileSync("losetup", ["--detach", loop]);
  }
  assert.ok(readFileSync(image).byteLength === 96 << 20);
});
