/**
 * What a host must have to load a memory that another one froze, as one value: VMM with version and arguments, CPU and TSC (all in the
 * driver's fingerprint), disks, and the network that the guest was booted on.
 */
import { createHash } from "node:crypto";
import { splitTscRate, withTscRate } from "@rookery/protocol/memory-compat";
import type { Deps } from "./deps.ts";

/** `fingerprint`: of the memory's base, or of this host's VMM for what it can load. Compared by `isLoadable`. */
export function compatOf(
  {
    vmm,
    rootDisk,
    network,
  }: {
    vmm: Pick<Deps["vmm"], "kind">;
    rootDisk: Pick<Deps["rootDisk"], "kind">;
    network: Pick<Deps["network"], "kind" | "addressing">;
  },
  fingerprint: string,
): string {
  const { text, tscKhz } = splitTscRate(fingerprint);
  const parts = [vmm.kind, text, rootDisk.kind, network.kind, network.addressing];
  const digest = createHash("sha256").update(JSON.stringify(parts)).digest("hex");
  return tscKhz === undefined ? digest : withTscRate(digest, tscKhz);
}
