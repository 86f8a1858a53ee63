/**
 * Which warm image the pool keeps clones of: the one of the configured image
 * and shape, in its newest form.
 */
import type { Core } from "./core.ts";
import type { WarmImage } from "./warm-images.ts";

export function keepInPool(core: Core, image: string, warm: WarmImage): void {
  const { pool } = core.deps.config;
  const { vcpus, memoryMb } = warm.shape;
  if (
    pool.size === 0 ||
    image !== pool.image ||
    vcpus !== pool.shape.vcpus ||
    memoryMb !== pool.shape.memoryMb
  )
    return;
  if (core.pool.keptKey !== warm.key) core.pool.keep(warm, pool.size);
}
