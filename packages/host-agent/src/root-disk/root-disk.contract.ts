/** What every driver of root disks keeps. */
import { strict as assert } from "node:assert";
import { existsSync } from "node:fs";
import { readdir, rename } from "node:fs/promises";
import { join } from "node:path";
import { describe, test } from "vitest";
import type { LayerId } from "../ids.ts";
import type { DiskAttachment, DiskUser, RootDisk, RootDiskDriver } from "./root-disk.ts";
import { discard, expectFills, fill, IMAGE_BYTES, makeDiskWorld, MIB } from "./testing/disk-world.ts";
import type { DiskWorld, Fill } from "./testing/disk-world.ts";

const LAYER_ONE = "ly0000000000000001" as LayerId;
const LAYER_TWO = "ly0000000000000002" as LayerId;
const never = new AbortController().signal;

export function rootDiskContract(name: string, openDriver: () => RootDiskDriver): void {
  describe(`${name}: the contract of root disks`, () => {
    const driver = openDriver();
    const create = (world: DiskWorld, dir: string, chain = world.chain, sizeBytes = IMAGE_BYTES) =>
      driver.create({ dir: join(world.root, dir), chain, sizeBytes }, never);
    /** Attaches, does, detaches. */
    const using = async (
      disk: RootDisk,
      user: DiskUser,
      work: (attached: DiskAttachment) => Promise<void>,
    ) => {
      await work(await driver.attach(disk, user, never));
      await driver.detach(disk, user, never);
    };
    const read = (disk: RootDisk, user: DiskUser, ...fills: Fill[]) =>
      using(disk, user, (attached) => expectFills(attached, user, ...fills));
    const freeze = (world: DiskWorld, disk: RootDisk, layerId: LayerId) =>
      driver
        .prepareNextTop(disk, undefined, never)
        .then(() => driver.commitNextTop(disk, { layerId, layersDir: world.layersDir }, never));

    test("a new disk reads as its image, with zeros up to its size", async () => {
      await using world = await makeDiskWorld();
      const user = await world.user("a");
      const disk = await create(world, "disk", world.chain, 2 * IMAGE_BYTES);
      await read(disk, user, { mib: 0, byte: 0x11 }, { mib: 1, byte: 0 }, { mib: 31, byte: 0 });
    });

    test("a disk cannot be less than what it stands on, nor take another's place", async () => {
      await using world = await makeDiskWorld();
      await assert.rejects(create(world, "disk", world.chain, IMAGE_BYTES - MIB), /are less than/);
      await create(world, "disk");
      await assert.rejects(create(world, "disk"), /there is a disk already/);
    });

    test("what was written is there after the disk was moved and opened anew", async () => {
      await using world = await makeDiskWorld();
      const user = await world.user("a");
      const disk = await create(world, "disk");
      await using(disk, user, (attached) => fill(attached, user, { mib: 3, byte: 0x33 }));
      await driver.sync(disk);
      await rename(disk.dir, join(world.root, "moved"));
      const moved = await driver.open(join(world.root, "moved"));
      assert.deepEqual(moved, { ...disk, dir: join(world.root, "moved") });
      await read(moved, await world.user("b"), { mib: 0, byte: 0x11 }, { mib: 3, byte: 0x33 });
    });

    test("attaching and detaching bear running twice, and leave no file behind", async () => {
      await using world = await makeDiskWorld();
      const user = await world.user("a");
      const disk = await create(world, "disk");
      const attached = await driver.attach(disk, user, never);
      assert.deepEqual(await driver.attach(disk, user, never), attached);
      await fill(attached, user, { mib: 0, byte: 1 });
      await driver.detach(disk, user, never);
      await driver.detach(disk, user, never);
      assert.deepEqual(await readdir(user.runDir), []);
    });

    test("disks on one layer do not see each other's writes", async () => {
      await using world = await makeDiskWorld();
      const [a, b] = [await world.user("a"), await world.user("b")];
      const source = await create(world, "source");
      await using(source, a, (attached) => fill(attached, a, { mib: 1, byte: 0x22 }));
      const { chain } = await freeze(world, source, LAYER_ONE);
      const [one, other] = [await create(world, "one", [...chain]), await create(world, "other", [...chain])];
      await using(one, a, (attached) => fill(attached, a, { mib: 1, byte: 0x33 }));
      await read(other, b, { mib: 0, byte: 0x11 }, { mib: 1, byte: 0x22 });
      await read(one, a, { mib: 1, byte: 0x33 });
    });

    test("a fork under a running VMM keeps the past in a layer and the future on top", async () => {
      await using world = await makeDiskWorld();
      const user = await world.user("a");
      const disk = await create(world, "disk");
      const before = await driver.attach(disk, user, never);
      await fill(before, user, { mib: 1, byte: 0x22 });
      const { next } = await driver.prepareNextTop(disk, user, never);
      await fill(next, user, { mib: 2, byte: 0x33 }); // the VMM has switched
      const forked = await driver.commitNextTop(
        disk,
        { layerId: LAYER_ONE, layersDir: world.layersDir },
        never,
      );
      assert.deepEqual(forked.chain.at(-1)?.kind, "layer");
      assert.deepEqual(await driver.open(disk.dir), forked);
      await expectFills(next, user, { mib: 1, byte: 0x22 }, { mib: 2, byte: 0x33 });
      await driver.detach(forked, user, never);

      const child = await create(world, "child", [...forked.chain]);
      await read(child, await world.user("b"), { mib: 1, byte: 0x22 }, { mib: 2, byte: 0 });
      await read(forked, user, { mib: 0, byte: 0x11 }, { mib: 1, byte: 0x22 }, { mib: 2, byte: 0x33 });
    });

    test("preparing twice is preparing once, and committing twice is committing once", async () => {
      await using world = await makeDiskWorld();
      const user = await world.user("a");
      const disk = await create(world, "disk");
      await driver.attach(disk, user, never);
      const { next } = await driver.prepareNextTop(disk, user, never);
      await fill(next, user, { mib: 2, byte: 0x33 });
      assert.deepEqual(await driver.prepareNextTop(disk, user, never), { next });
      const options = { layerId: LAYER_ONE, layersDir: world.layersDir };
      const forked = await driver.commitNextTop(disk, options, never);
      assert.deepEqual(await driver.commitNextTop(disk, options, never), forked);
      await driver.detach(forked, user, never);
      await read(forked, user, { mib: 2, byte: 0x33 });
    });

    test("an aborted fork leaves the disk as it was, and one that was committed is not aborted", async () => {
      await using world = await makeDiskWorld();
      const user = await world.user("a");
      const disk = await create(world, "disk");
      const attached = await driver.attach(disk, user, never);
      const linked = await readdir(user.runDir);
      await driver.prepareNextTop(disk, user, never);
      await driver.abortNextTop(disk, user);
      await driver.abortNextTop(disk, user);
      assert.deepEqual(await readdir(user.runDir), linked);
      await fill(attached, user, { mib: 1, byte: 0x22 });
      await driver.detach(disk, user, never);

      const frozen = await freeze(world, disk, LAYER_ONE);
      await driver.abortNextTop(disk, user);
      await read(frozen, user, { mib: 1, byte: 0x22 });
    });

    test("a disk grows, with zeros, and never shrinks", async () => {
      await using world = await makeDiskWorld();
      const user = await world.user("a");
      const disk = await create(world, "disk");
      await using(disk, user, (attached) => fill(attached, user, { mib: 15, byte: 0x22 }));
      const grown = await driver.grow(disk, 2 * IMAGE_BYTES, never);
      assert.equal(grown.sizeBytes, 2 * IMAGE_BYTES);
      assert.deepEqual(await driver.grow(grown, 2 * IMAGE_BYTES, never), grown);
      await assert.rejects(driver.grow(grown, IMAGE_BYTES, never), /does not shrink/);
      await read(
        await driver.open(disk.dir),
        user,
        { mib: 15, byte: 0x22 },
        { mib: 16, byte: 0 },
        { mib: 31, byte: 0 },
      );
    });

    test("flattening leaves the image alone below and every byte as it was", async () => {
      await using world = await makeDiskWorld();
      const user = await world.user("a");
      let disk = await create(world, "disk");
      await using(disk, user, (attached) =>
        fill(attached, user, { mib: 1, byte: 0x22 }, { mib: 2, byte: 0x23 }),
      );
      disk = await freeze(world, disk, LAYER_ONE);
      await using(disk, user, async (attached) => {
        await fill(attached, user, { mib: 2, byte: 0x33 }, { mib: 3, byte: 0x34 });
        await discard(attached, user, 0);
      });
      disk = await driver.grow(await freeze(world, disk, LAYER_TWO), 2 * IMAGE_BYTES, never);
      await using(disk, user, (attached) => fill(attached, user, { mib: 20, byte: 0x44 }));
      const flat = await driver.flatten(disk, never);
      assert.deepEqual(flat.chain, world.chain);
      assert.equal(driver.needsFlatten(flat), false);
      assert.deepEqual(await driver.flatten(flat, never), flat);
      const bytes = [0, 0x22, 0x33, 0x34, 0].map((byte, mib) => ({ mib, byte }));
      await read(flat, user, ...bytes, { mib: 20, byte: 0x44 }, { mib: 31, byte: 0 });
      assert.deepEqual((await readdir(world.layersDir)).sort(), [LAYER_ONE, LAYER_TWO]);
      await read(await freeze(world, flat, "ly0000000000000003" as LayerId), user, ...bytes);
    });

    test("what a disk uses is what was written, not what it could hold", async () => {
      await using world = await makeDiskWorld();
      const user = await world.user("a");
      const disk = await create(world, "disk", world.chain, 4096 * MIB);
      const empty = await driver.allocatedBytes(disk);
      assert(empty < MIB, `an empty top uses ${empty} bytes`);
      await using(disk, user, (attached) => fill(attached, user, { mib: 5, byte: 1 }, { mib: 9, byte: 1 }));
      const used = (await driver.allocatedBytes(disk)) - empty;
      assert(used >= 2 * MIB && used < 3 * MIB, `${used} bytes for 2 MiB`);
    });

    test("removing a disk bears running twice and leaves its layers", async () => {
      await using world = await makeDiskWorld();
      const user = await world.user("a");
      const disk = await freeze(world, await create(world, "disk"), LAYER_ONE);
      await driver.remove(disk.dir);
      await driver.remove(disk.dir);
      await driver.detach(disk, user, never);
      await driver.abortNextTop(disk, user);
      assert(!existsSync(disk.dir));
      await read(await create(world, "child", [...disk.chain]), user, { mib: 0, byte: 0x11 });
    });

    test("this machine can keep such disks", async () => {
      assert.deepEqual(await driver.probe(never), { ok: true });
    });
  });
}
