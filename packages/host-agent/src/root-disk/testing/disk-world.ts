/** A throw-away place with an image, and a VMM's hands on its disks: qemu-io, as the VMM's uid, in its run directory. */
import { chown, mkdir, mkdtemp, open } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { removeTree } from "../../host/atomic-file.ts";
import { run } from "../../host/run.ts";
import type { DiskAttachment, DiskLayer, DiskUser } from "../root-disk.ts";

export const MIB = 1 << 20;
export const IMAGE_BYTES = 16 * MIB;
const IS_ROOT = process.getuid?.() === 0;

/** One MiB at `mib` is full of `byte`. */
export interface Fill {
  mib: number;
  byte: number;
}

export interface DiskWorld extends AsyncDisposable {
  root: string;
  layersDir: string;
  /** One raw image whose first MiB is full of 0x11. */
  chain: DiskLayer[];
  /** Each with a run directory of its own. */
  user(name: string): Promise<DiskUser>;
}

export async function makeDiskWorld(): Promise<DiskWorld> {
  const root = await mkdtemp(join(tmpdir(), "rookery-disk-"));
  const image = join(root, "image.raw");
  {
    await using file = await open(image, "wx", 0o444);
    await file.truncate(IMAGE_BYTES);
    await file.write(Buffer.alloc(MIB, 0x11), 0, MIB, 0);
  }
  const layersDir = join(root, "layers");
  await mkdir(layersDir);
  let users = 0;
  return {
    root,
    layersDir,
    chain: [{ kind: "image", path: image, format: "raw" }],
    async user(name) {
      const runDir = join(root, `run-${name}`);
      await mkdir(runDir, { mode: 0o700 });
      const uid = IS_ROOT ? 510_000 + users++ : (process.getuid?.() ?? 0);
      if (IS_ROOT) await chown(runDir, uid, uid);
      return { runDir, uid };
    },
    [Symbol.asyncDispose]: () => removeTree(root),
  };
}

export async function fill(attachment: DiskAttachment, user: DiskUser, ...fills: Fill[]): Promise<void> {
  await io(
    attachment,
    user,
    fills.map(({ mib, byte }) => `write -P ${byte} ${mib}M 1M`),
  );
}

/** As a guest's `fstrim` does. */
export async function discard(attachment: DiskAttachment, user: DiskUser, mib: number): Promise<void> {
  await io(attachment, user, [`write -z -u ${mib}M 1M`]);
}

/** Throws when a MiB is not what it should be. */
export async function expectFills(
  attachment: DiskAttachment,
  user: DiskUser,
  ...fills: Fill[]
): Promise<void> {
  await io(
    attachment,
    user,
    fills.map(({ mib, byte }) => `read -P ${byte} ${mib}M 1M`),
  );
}

async function io(attachment: DiskAttachment, user: DiskUser, commands: string[]): Promise<void> {
  const argv = [
    ...(IS_ROOT
      ? ["setpriv", `--reuid=${user.uid}`, `--regid=${user.uid}`, "--clear-groups", "--no-new-privs", "--"]
      : []),
    "qemu-io",
    ...commands.flatMap((command) => ["-c", command]),
    "--image-opts",
    imageOptions(attachment),
  ];
  const [program = "", ...args] = argv;
  const { stdout } = await run([program, ...args], { cwd: user.runDir });
  if (/Pattern verification failed|error/i.test(stdout)) throw new Error(`${commands.join("; ")}: ${stdout}`);
}

function imageOptions(attachment: DiskAttachment): string {
  if (attachment.kind === "block-device") return `driver=host_device,filename=${attachment.path}`;
  return attachment.nodes
    .flatMap(({ file, format, readOnly }, depth) => {
      const prefix = "backing.".repeat(depth);
      const access = readOnly ? [`${prefix}read-only=on`] : [];
      return [
        `${prefix}driver=${format}`,
        `${prefix}file.driver=file`,
        `${prefix}file.filename=${file}`,
        ...access,
      ];
    })
    .join(",");
}
