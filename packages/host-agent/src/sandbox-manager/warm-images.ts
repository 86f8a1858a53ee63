/**
 * What the manager and the pool need of warm images: templates booted once,
 * from which sandboxes are cloned. `warm-images/` builds and keeps them.
 */
import type { WarmKey } from "../ids.ts";
import type { DiskLayer } from "../root-disk/root-disk.ts";
import type { MemoryBase, VmShape } from "../vmm/vmm.ts";

export interface WarmImage {
  key: WarmKey;
  base: MemoryBase;
  /** What a clone's disk stands on, bottom first. */
  diskChain: readonly DiskLayer[];
  /** Virtual size of the disk that the frozen guest knows. */
  diskSizeBytes: number;
  shape: VmShape;
  /** The guest image that it was booted from; absent in simulated ones. */
  image?: { name: string; hash: string };
}

export interface WarmImages {
  /**
   * The warm image of an image and a shape; built first, once for all who ask,
   * when there is none. `template_not_found` and `unsupported_shape` as the API has them.
   */
  ensure(image: string, shape: VmShape, signal: AbortSignal): Promise<WarmImage>;
  /** The one of a key, for a memory layer that is a difference from it; undefined when it is gone. */
  open(key: WarmKey, signal: AbortSignal): Promise<WarmImage | undefined>;
}
