/**
 * Which disk layers are still needed: mark and sweep over the manifests.
 *
 * A layer is needed by a sandbox's chain, by a snapshot, or by an operation
 * that is about to build a chain on it (a pin). Nothing counts references.
 */
import { join } from "node:path";
import { removeTree } from "../host/atomic-file.ts";
import type { LayerId } from "../ids.ts";
import { sweepLayers } from "../root-disk/layers.ts";
import type { DiskLayer } from "../root-disk/root-disk.ts";

export class DiskLayers {
  readonly #layersDir: string;
  /** All chains of sandboxes and snapshots that exist now. */
  readonly #chains: () => Iterable<readonly DiskLayer[]>;
  readonly #pins = new Set<readonly LayerId[]>();
  readonly #removing = new Map<LayerId, Promise<void>>();

  constructor(layersDir: string, chains: () => Iterable<readonly DiskLayer[]>) {
    this.#layersDir = layersDir;
    this.#chains = chains;
  }

  /** Keeps layers until disposed, whatever becomes of the chains that name them now. */
  pin(layers: readonly LayerId[]): Disposable {
    const pinned = [...layers];
    this.#pins.add(pinned);
    return { [Symbol.dispose]: () => void this.#pins.delete(pinned) };
  }

  /** A pin on layers that may be on their way out: when it resolves, each is there to stay, or gone. */
  async claim(layers: readonly LayerId[]): Promise<Disposable> {
    const pin = this.pin(layers);
    await Promise.allSettled(layers.flatMap((id) => this.#removing.get(id) ?? []));
    return pin;
  }

  /** Removes those of `candidates` that nothing needs. Bears running twice. */
  async sweep(candidates: Iterable<LayerId>): Promise<void> {
    for (const id of candidates) {
      // Looked at anew for each: a removal takes time, and an operation may pin meanwhile.
      if (this.#needed().has(id)) continue;
      const removal = removeTree(join(this.#layersDir, id));
      this.#removing.set(id, removal);
      try {
        await removal;
      } finally {
        if (this.#removing.get(id) === removal) this.#removing.delete(id);
      }
    }
  }

  /** For recovery: all that lie there, and what a crash left of making one. */
  async sweepAll(): Promise<void> {
    await sweepLayers(this.#layersDir, this.#needed());
  }

  #needed(): Set<LayerId> {
    const needed = new Set<LayerId>();
    for (const chain of this.#chains()) for (const id of layerIdsOf(chain)) needed.add(id);
    for (const pinned of this.#pins) for (const id of pinned) needed.add(id);
    return needed;
  }
}

/** The layers of a chain; image disks are not ours to sweep. */
export function layerIdsOf(chain: readonly DiskLayer[]): LayerId[] {
  return chain.flatMap((layer) => (layer.kind === "layer" ? [layer.id] : []));
}
