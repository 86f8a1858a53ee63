/**
 * The journal: what this agent owns, in one small file per sandbox, VM and
 * snapshot, each replaced as a whole.
 *
 *   DATA/sandboxes/ID/  sandbox.json, disk/, layer-VMID/
 *   DATA/vms/ID/        vm.json, run/, log/, disk/
 *   DATA/snapshots/ID/  snapshot.json (written last: without it there is no snapshot), layer/
 *   DATA/layers/ID/     disk.qcow2
 *
 * A write that need not survive a power cut is not synced: VMs and namespaces
 * end with the power anyway, and records bear the boot that they were written in.
 */
import { mkdir, readdir, rename } from "node:fs/promises";
import { join } from "node:path";
import type { z } from "zod";
import { readJson, removeTree, syncDirectory, writeFileAtomic } from "../host/atomic-file.ts";
import { isErrno } from "../host/errno.ts";
import type { SandboxId, SnapshotId, VmId } from "../ids.ts";
import {
  sandboxIdSchema,
  sandboxRecordSchema,
  snapshotIdSchema,
  snapshotRecordSchema,
  toJson,
  vmIdSchema,
  vmPlaceRecordSchema,
  type SandboxRecord,
  type SnapshotRecord,
  type VmPlaceRecord,
} from "./records.ts";

export interface JournalScan<Id, Record> {
  records: Record[];
  /** Directories without a record: made by an operation that did not get that far. */
  empty: Id[];
  /** Records that cannot be read. */
  broken: { id: Id; cause: unknown }[];
}

export class Journal {
  readonly dataDir: string;
  readonly layersDir: string;

  constructor(dataDir: string) {
    this.dataDir = dataDir;
    this.layersDir = join(dataDir, "layers");
  }

  async open(): Promise<void> {
    await mkdir(this.dataDir, { recursive: true, mode: 0o711 });
    for (const name of ["sandboxes", "vms", "snapshots", "layers"]) {
      await mkdir(join(this.dataDir, name), { recursive: true, mode: 0o711 });
    }
  }

  sandboxDir(id: SandboxId): string {
    return join(this.dataDir, "sandboxes", id);
  }
  diskDir(id: SandboxId): string {
    return join(this.sandboxDir(id), "disk");
  }
  memoryLayerDir(id: SandboxId, name: string): string {
    return join(this.sandboxDir(id), name);
  }
  vmDir(id: VmId): string {
    return join(this.dataDir, "vms", id);
  }
  vmDiskDir(id: VmId): string {
    return join(this.vmDir(id), "disk");
  }
  snapshotDir(id: SnapshotId): string {
    return join(this.dataDir, "snapshots", id);
  }
  snapshotLayerDir(id: SnapshotId): string {
    return join(this.snapshotDir(id), "layer");
  }

  /** `durable`: it survives a power cut, with the directory that it stands in. */
  async writeSandbox(record: SandboxRecord, options: { durable: boolean }): Promise<void> {
    const dir = this.sandboxDir(record.spec.id);
    const made = await mkdir(dir, { recursive: true, mode: 0o711 });
    await writeFileAtomic(join(dir, "sandbox.json"), toJson(record), { sync: options.durable });
    if (options.durable && made !== undefined) await syncDirectory(join(this.dataDir, "sandboxes"));
  }

  async writeVm(record: VmPlaceRecord): Promise<void> {
    await mkdir(this.vmDir(record.vmId), { recursive: true, mode: 0o711 });
    await writeFileAtomic(join(this.vmDir(record.vmId), "vm.json"), toJson(record), { sync: false });
  }

  /** What makes a snapshot one: durable when it returns. */
  async writeSnapshot(record: SnapshotRecord): Promise<void> {
    await writeFileAtomic(join(this.snapshotDir(record.id), "snapshot.json"), toJson(record));
    await syncDirectory(join(this.dataDir, "snapshots"));
  }

  scanSandboxes(): Promise<JournalScan<SandboxId, SandboxRecord>> {
    return this.#scan("sandboxes", "sandbox.json", sandboxIdSchema, sandboxRecordSchema);
  }
  scanVms(): Promise<JournalScan<VmId, VmPlaceRecord>> {
    return this.#scan("vms", "vm.json", vmIdSchema, vmPlaceRecordSchema);
  }
  scanSnapshots(): Promise<JournalScan<SnapshotId, SnapshotRecord>> {
    return this.#scan("snapshots", "snapshot.json", snapshotIdSchema, snapshotRecordSchema);
  }
  async removeSandboxDir(id: SandboxId): Promise<void> {
    await removeTree(this.sandboxDir(id));
  }
  /** Durably: from here on there is no such snapshot, whatever is left of it. */
  async forgetSnapshot(id: SnapshotId): Promise<void> {
    const dir = this.snapshotDir(id);
    try {
      await removeTree(join(dir, "snapshot.json"));
      await syncDirectory(dir);
    } catch (cause) {
      if (!isErrno(cause, "ENOENT")) throw cause;
    }
  }
  async removeSnapshotDir(id: SnapshotId): Promise<void> {
    await this.forgetSnapshot(id);
    await removeTree(this.snapshotDir(id));
  }

  /** Sets a sandbox whose record cannot be read aside, for a person to look at. */
  async setAside(id: SandboxId, suffix: string): Promise<string> {
    const lost = join(this.dataDir, "lost");
    await mkdir(lost, { recursive: true, mode: 0o700 });
    const to = join(lost, `${id}-${suffix}`);
    await rename(this.sandboxDir(id), to);
    return to;
  }

  async #scan<Id, S extends z.ZodType>(
    folder: string,
    file: string,
    idSchema: z.ZodType<Id>,
    schema: S,
  ): Promise<JournalScan<Id, z.output<S>>> {
    const scan: JournalScan<Id, z.output<S>> = { records: [], empty: [], broken: [] };
    for (const name of await readdir(join(this.dataDir, folder))) {
      const id = idSchema.safeParse(name);
      if (!id.success) continue; // not ours
      try {
        scan.records.push(await readJson(join(this.dataDir, folder, name, file), schema));
      } catch (cause) {
        if (isErrno(cause, "ENOENT")) scan.empty.push(id.data);
        else scan.broken.push({ id: id.data, cause });
      }
    }
    return scan;
  }
}
