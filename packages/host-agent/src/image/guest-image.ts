/**
 * A guest image: kernel, initrd, kernel arguments and root disk that boot
 * together, as immutable files in DATA/images/HASH.
 *
 * Invariant: the directory's name is a hash over all that went into the image,
 * and its manifest was written last; so what has a manifest is whole, and two
 * images of one hash are the same.
 */
import { z } from "zod";

export interface GuestImage {
  name: string;
  /** Over all inputs; 64 hex characters. */
  hash: string;
  dir: string;
  kernel: string;
  initrd: string;
  /** Complete but for what only the one who boots it knows: see cmdline.ts. */
  cmdline: string;
  rootDisk: { path: string; format: "raw"; sizeBytes: number };
  createdAt: Date;
}

export const KERNEL_FILE = "vmlinuz";
export const INITRD_FILE = "initrd.img";
export const ROOT_DISK_FILE = "root.raw";
export const MANIFEST_FILE = "manifest.json";

const sha256 = z.string().regex(/^[0-9a-f]{64}$/);

export const imageManifestSchema = z.object({
  version: z.literal(1),
  name: z.string(),
  hash: sha256,
  cmdline: z.string(),
  rootDiskBytes: z.number().int().positive(),
  createdAt: z.iso.datetime(),
  /** What the hash was taken over, for people: which package, which file differs. */
  inputs: z.record(z.string(), z.string()),
});

export type ImageManifest = z.output<typeof imageManifestSchema>;

export type ImageStep =
  | "wait"
  | "resolve"
  | "download"
  | "kernel"
  | "debian"
  | "root-disk"
  | "store"
  | "ready";

export interface ImageProgress {
  image: string;
  step: ImageStep;
  message: string;
  /** Of the step, 0 to 1, where it is known. */
  fraction?: number;
}
