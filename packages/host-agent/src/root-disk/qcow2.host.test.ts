import { strict as assert } from "node:assert";
import { copyFile, lstat, mkdir, open, readdir, readFile, rmdir, symlink, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { describe, test } from "vitest";
import { run } from "../host/run.ts";
import type { LayerId } from "../ids.ts";
import { sweepLayers } from "./layers.ts";
import { Qcow2RootDisks } from "./qcow2.ts";
import { rootDiskContract } from "./root-disk.contract.ts";
import type { RootDisk } from "./root-disk.ts";
import { expectFills, fill, IMAGE_BYTES, makeDiskWorld } from "./testing/disk-world.ts";
import type { DiskWorld } from "./testing/disk-world.ts";

const LAYER = "ly0000000000000001" as LayerId;
const never = new AbortController().signal;
const IS_ROOT = process.getuid?.() === 0;

rootDiskContract("qcow2", () => new Qcow2RootDisks());

describe("a crash after any effect", () => {
  class Crash extends Error {}
  interface Operation {
    name: string;
    /** The disk before. */
    setUp(driver: Qcow2RootDisks, world: DiskWorld): Promise<void>;
    /** What is cut off, and then run again by an agent that started anew. */
    act(driver: Qcow2RootDisks, world: DiskWorld): Promise<unknown>;
    effects: number;
  }
  const dirOf = (world: DiskWorld): string => join(world.root, "disk");
  const create = (driver: Qcow2RootDisks, world: DiskWorld): Promise<RootDisk> =>
    driver.create({ dir: dirOf(world), chain: world.chain, sizeBytes: IMAGE_BYTES }, never);
  const written = async (driver: Qcow2RootDisks, world: DiskWorld): Promise<RootDisk> => {
    const disk = await create(driver, world);
    const user = await world.user("writer");
    await fill(await driver.attach(disk, user, never), user, { mib: 1, byte: 0x22 });
    await driver.detach(disk, user, never);
    return disk;
  };
  const frozen = async (driver: Qcow2RootDisks, world: DiskWorld): Promise<RootDisk> => {
    const disk = await written(driver, world);
    await driver.prepareNextTop(disk, undefined, never);
    return driver.commitNextTop(disk, { layerId: LAYER, layersDir: world.layersDir }, never);
  };
  const present = (driver: Qcow2RootDisks, world: DiskWorld) => driver.open(dirOf(world));
  const operations: Operation[] = [
    {
      name: "prepareNextTop",
      setUp: async (driver, world) => void (await written(driver, world)),
      act: async (driver, world) => driver.prepareNextTop(await present(driver, world), undefined, never),
      effects: 3,
    },
    {
      name: "commitNextTop",
      setUp: async (driver, world) =>
        void (await driver.prepareNextTop(await written(driver, world), undefined, never)),
      act: async (driver, world) =>
        driver.commitNextTop(
          await present(driver, world),
          { layerId: LAYER, layersDir: world.layersDir },
          never,
        ),
      effects: 6,
    },
    {
      name: "abortNextTop",
      setUp: async (driver, world) =>
        void (await driver.prepareNextTop(await written(driver, world), undefined, never)),
      act: async (driver, world) => driver.abortNextTop(await present(driver, world), undefined),
      effects: 1,
    },
    {
      name: "grow",
      setUp: async (driver, world) => void (await written(driver, world)),
      act: async (driver, world) => driver.grow(await present(driver, world), 2 * IMAGE_BYTES, never),
      effects: 1,
    },
    {
      name: "flatten",
      setUp: async (driver, world) => void (await frozen(driver, world)),
      act: async (driver, world) => driver.flatten(await present(driver, world), never),
      effects: 4,
    },
  ];

  for (const operation of operations) {
    test(`of ${operation.name} leaves the disk whole, and the same call ends it`, async () => {
      for (let crashAt = 1; crashAt <= operation.effects + 1; crashAt++) {
        await using world = await makeDiskWorld();
        let armed = false;
        let effects = 0;
        const crashing = new Qcow2RootDisks({
          afterEffect: () => {
            if (armed && ++effects === crashAt) throw new Crash();
          },
        });
        const driver = new Qcow2RootDisks();
        await operation.setUp(driver, world);
        const reader = await world.user("reader");
        const expectWhole = async (): Promise<void> => {
          const disk = await present(driver, world);
          const attached = await driver.attach(disk, reader, never);
          await expectFills(attached, reader, { mib: 0, byte: 0x11 }, { mib: 1, byte: 0x22 });
          await driver.detach(disk, reader, never);
        };
        armed = true;
        if (crashAt > operation.effects) {
          await operation.act(crashing, world);
          assert.equal(effects, operation.effects, "the number of effects that the test counts on");
        } else {
          await assert.rejects(operation.act(crashing, world), Crash);
          await expectWhole();
        }
        await operation.act(driver, world);
        await expectWhole();
        const { length } = (await present(driver, world)).chain;
        for (const name of await readdir(dirOf(world))) assert.match(name, /^(disk\.json|top-\d)$/);
        const isPrepared = operation.name === "prepareNextTop";
        assert.equal((await readdir(dirOf(world))).length, isPrepared ? 3 : 2, `after effect ${crashAt}`);
        await run(["qemu-img", "check", "-q", join(dirOf(world), `top-${length}`, "disk.qcow2")]);
      }
    });
  }

  test("of create leaves a place where it can be made anew", async () => {
    for (let crashAt = 1; crashAt <= 3; crashAt++) {
      await using world = await makeDiskWorld();
      let effects = 0;
      const crashing = new Qcow2RootDisks({
        afterEffect: () => {
          if (++effects === crashAt) throw new Crash();
        },
      });
      await assert.rejects(create(crashing, world), Crash);
      await create(new Qcow2RootDisks(), world);
    }
  });

  test("of a fork whose VMM has switched loses nothing that it wrote since", async () => {
    for (let crashAt = 1; crashAt <= 6; crashAt++) {
      await using world = await makeDiskWorld();
      const driver = new Qcow2RootDisks();
      const user = await world.user("vmm");
      const disk = await create(driver, world);
      await driver.attach(disk, user, never);
      const { next } = await driver.prepareNextTop(disk, user, never);
      await fill(next, user, { mib: 2, byte: 0x33 });
      let effects = 0;
      const crashing = new Qcow2RootDisks({
        afterEffect: () => {
          if (++effects === crashAt) throw new Crash();
        },
      });
      const options = { layerId: LAYER, layersDir: world.layersDir };
      await assert.rejects(crashing.commitNextTop(disk, options, never), Crash);
      await driver.detach(await driver.open(disk.dir), user, never); // the VMM died meanwhile
      const forked = await driver.commitNextTop(await driver.open(disk.dir), options, never);
      await expectFills(await driver.attach(forked, user, never), user, { mib: 2, byte: 0x33 });
    }
  });
});

describe("tools outside of the product", () => {
  test("qemu-img finds the whole chain of a disk, of a layer and of a next top by their headers", async () => {
    await using world = await makeDiskWorld();
    const driver = new Qcow2RootDisks();
    const disk = await driver.create(
      { dir: join(world.root, "disk"), chain: world.chain, sizeBytes: IMAGE_BYTES },
      never,
    );
    await driver.prepareNextTop(disk, undefined, never);
    const depthOf = async (file: string): Promise<number> => {
      const { stdout } = await run(["qemu-img", "info", "--backing-chain", "--output=json", file]);
      await run(["qemu-img", "check", "-q", file]);
      return (JSON.parse(stdout) as unknown[]).length;
    };
    assert.equal(await depthOf(join(disk.dir, "top-2/disk.qcow2")), 3);
    const forked = await driver.commitNextTop(disk, { layerId: LAYER, layersDir: world.layersDir }, never);
    assert.equal(await depthOf(join(disk.dir, "top-2/disk.qcow2")), 3);
    assert.equal(await depthOf(forked.chain[1]?.path ?? ""), 2);
  });
});

describe("a VMM that was broken into", () => {
  test.skipIf(!IS_ROOT)("can write its own top and nothing below", async () => {
    await using world = await makeDiskWorld();
    const driver = new Qcow2RootDisks();
    const user = await world.user("vmm");
    const disk = await driver.create(
      { dir: join(world.root, "disk"), chain: world.chain, sizeBytes: IMAGE_BYTES },
      never,
    );
    const attached = await driver.attach(disk, user, never);
    assert(attached.kind === "file-chain");
    const as = ["setpriv", `--reuid=${user.uid}`, `--regid=${user.uid}`, "--clear-groups", "--"] as const;
    const [top, image] = attached.nodes.map((node) => join(user.runDir, node.file));
    assert(top !== undefined && image !== undefined);
    await run([...as, "test", "-w", "."], { cwd: user.runDir });
    for (const script of [`: >> ${attached.nodes[1]?.file}`, `chmod 666 ${attached.nodes[1]?.file}`]) {
      await assert.rejects(
        run([...as, "sh", "-c", script], { cwd: user.runDir }),
        /Permission denied|not permitted/,
      );
    }
    await driver.detach(disk, user, never);
    const facts = await lstat(join(disk.dir, "top-1/disk.qcow2"));
    assert.deepEqual([facts.uid, facts.gid, facts.mode & 0o7777], [0, 0, 0o600]);
  });

  test("gains nothing from what it plants under the names of disks", async () => {
    await using world = await makeDiskWorld();
    const driver = new Qcow2RootDisks();
    const user = await world.user("vmm");
    const disk = await driver.create(
      { dir: join(world.root, "disk"), chain: world.chain, sizeBytes: IMAGE_BYTES },
      never,
    );
    const { next } = await driver.prepareNextTop(disk, undefined, never);
    assert(next.kind === "file-chain");
    const victim = join(world.root, "victim");
    await writeFile(victim, "mine");
    const [first = "", second = "", third = ""] = next.nodes.map((node) => join(user.runDir, node.file));
    await symlink(victim, first);
    await mkdir(second);
    await writeFile(third, "planted");
    // A directory is not walked into: what lies there could be exchanged under our feet.
    await assert.rejects(driver.attach(disk, user, never), { code: "host_error" });
    await rmdir(second);
    await driver.attach(disk, user, never);
    const prepared = await driver.prepareNextTop(disk, user, never);
    assert.deepEqual(prepared, { next });
    await expectFills(next, user, { mib: 0, byte: 0x11 });
    await driver.detach(disk, user, never);
    assert.deepEqual(await readdir(user.runDir), []);
    assert.equal(await readFile(victim, "utf8"), "mine");
  });

  test("cannot make our tools read another file by what its header says", async () => {
    await using world = await makeDiskWorld();
    const driver = new Qcow2RootDisks();
    const disk = await driver.create(
      { dir: join(world.root, "disk"), chain: world.chain, sizeBytes: IMAGE_BYTES },
      never,
    );
    const top = join(disk.dir, "top-1/disk.qcow2");
    const secret = join(world.root, "secret");
    await writeFile(secret, "s".repeat(4096));
    await run(["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", secret, top]);
    await assert.rejects(driver.grow(disk, 2 * IMAGE_BYTES, never), /stands on .*secret, not on below-0/);
    await run(["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", "below-0", top]);
    {
      await using file = await open(top, "r+");
      await file.write(Buffer.from([0, 0, 0, 0, 0, 0, 0, 4]), 0, 8, 72); // incompatible feature: external data file
    }
    await driver.prepareNextTop(disk, undefined, never);
    const options = { layerId: LAYER, layersDir: world.layersDir };
    await assert.rejects(driver.commitNextTop(disk, options, never), /incompatible features 0x4/);
  });
});

describe("a layer that another host wrote", () => {
  test("reads on this host as it did there, and is taken in once", async () => {
    await using there = await makeDiskWorld();
    await using here = await makeDiskWorld();
    const driver = new Qcow2RootDisks();
    const theirs = await driver.create(
      { dir: join(there.root, "disk"), chain: there.chain, sizeBytes: IMAGE_BYTES },
      never,
    );
    const writer = await there.user("writer");
    await fill(await driver.attach(theirs, writer, never), writer, { mib: 1, byte: 0x22 });
    await driver.detach(theirs, writer, never);
    await driver.prepareNextTop(theirs, undefined, never);
    const { chain } = await driver.commitNextTop(
      theirs,
      { layerId: LAYER, layersDir: there.layersDir },
      never,
    );

    const file = join(here.root, "fetched");
    const options = { file, layerId: LAYER, layersDir: here.layersDir, below: here.chain };
    for (let time = 1; time <= 2; time += 1) {
      await copyFile(chain[1]!.path, file);
      const layer = await driver.adoptLayer(options, never);
      assert.equal(layer.path, join(here.layersDir, LAYER, "disk.qcow2"));
      assert.equal((await lstat(layer.path)).mode & 0o777, 0o444);
    }
    const user = await here.user("reader");
    const disk = await driver.create(
      {
        dir: join(here.root, "disk"),
        chain: [...here.chain, await driver.adoptLayer(options, never)],
        sizeBytes: IMAGE_BYTES,
      },
      never,
    );
    const attached = await driver.attach(disk, user, never);
    await expectFills(attached, user, { mib: 0, byte: 0x11 }, { mib: 1, byte: 0x22 }, { mib: 2, byte: 0 });
  });

  test("is refused when its header names another file, and nothing has read it", async () => {
    await using world = await makeDiskWorld();
    const driver = new Qcow2RootDisks();
    const secret = join(world.root, "secret");
    await writeFile(secret, "s".repeat(4096));
    const file = join(world.root, "fetched");
    const below = world.chain;
    const adopt = () => driver.adoptLayer({ file, layerId: LAYER, layersDir: world.layersDir, below }, never);
    for (const backing of [secret, "below-1", "../below-0"]) {
      await run(["qemu-img", "create", "-f", "qcow2", file, `${IMAGE_BYTES}`]);
      await run(["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", backing, file]);
      await assert.rejects(adopt(), /stands on .*, not on below-0/);
    }
    await run(["qemu-img", "create", "-f", "qcow2", file, `${IMAGE_BYTES}`]);
    await assert.rejects(adopt(), /stands on nothing/);
    await writeFile(file, "no qcow2 at all".repeat(100));
    await assert.rejects(adopt(), /is no qcow2 file/);
    assert.deepEqual(await readdir(world.layersDir), []);
  });
});

test("sweeping removes the layers that nothing refers to, and nothing else", async () => {
  await using world = await makeDiskWorld();
  const kept = "ly0000000000000002" as LayerId;
  for (const name of [LAYER, kept, ".ly0000000000000003.tmp", "mine"])
    await mkdir(join(world.layersDir, name));
  assert.deepEqual(await sweepLayers(world.layersDir, new Set([kept])), ["ly0000000000000003", LAYER]);
  assert.deepEqual((await readdir(world.layersDir)).sort(), [kept, "mine"]);
  assert.deepEqual(await sweepLayers(join(world.root, "none"), new Set()), []);
});
