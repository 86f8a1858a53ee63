/** The simulated VMM keeps the contract: what is tested on it would be worth nothing otherwise. */
import { appendFileSync, mkdirSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import type { Slot, VmId } from "../ids.ts";
import { newRoot } from "../sandbox-manager/testing/simulated-machine.ts";
import { openSimulatedDisks } from "../root-disk/simulated.ts";
import { memoryProcessTable, type SimulatedProcess } from "./simulated-processes.ts";
import { openSimulatedVmm } from "./simulated.ts";
import { vmmContract, type VmmTestBed } from "./vmm.contract.ts";
import type { Vm, VmPlace } from "./vmm.ts";

vmmContract("simulated", async () => {
  const dir = newRoot();
  const processes = memoryProcessTable();
  const open = () => openSimulatedVmm({ processes, guestWritesDisk: true });
  let vmm = open();
  let places = 0;
  const imagePath = join(dir, "image.raw");
  writeFileSync(imagePath, "0");

  const processOf = (vm: Vm): SimulatedProcess => processes.get(vm.record.pid)!;
  const remember = (vm: Vm, key: string, value: string): void => {
    const process = processOf(vm);
    const memory = { ...process.guest.memory, [key]: value };
    processes.set({ ...process, guest: { ...process.guest, memory } });
  };
  const recall = (vm: Vm, key: string): string => {
    if (processOf(vm).corrupt) throw new Error("memory and disk do not fit");
    return processOf(vm).guest.memory[key] ?? "";
  };
  const bed: VmmTestBed = {
    get vmm() {
      return vmm;
    },
    rootDisk: openSimulatedDisks(() => undefined),
    shape: { vcpus: 1, memoryMb: 256 },
    boot: { kernel: "", initrd: "", cmdline: "" },
    image: { chain: [{ kind: "image", path: imagePath, format: "raw" }], sizeBytes: 1 << 20 },
    dir,
    async makePlace(): Promise<VmPlace> {
      const slot = places++ as Slot;
      const runDir = join(dir, `run-${slot}`);
      mkdirSync(runDir);
      const vmId = `vm${String(slot).padStart(16, "0")}` as VmId;
      const nic = { kind: "user" as const, mac: "02:00:00:00:00:01", forwards: [] };
      return { vmId, uid: 0, runDir, socketDir: runDir, logDir: runDir, cgroupProcs: [], nic };
    },
    async removePlace(place) {
      rmSync(place.runDir, { recursive: true, force: true });
    },
    async restartDriver() {
      await vmm.close();
      vmm = open();
      return vmm;
    },
    async killFromOutside(vm) {
      vmm.crash(vm.record.pid, { reason: "vmm_exited", message: "killed by another" });
    },
    async damage(layer) {
      appendFileSync(join(layer.dir, "guest.json"), " ");
    },
    guest: {
      async ready(vm) {
        recall(vm, "");
      },
      async remember(vm, text) {
        remember(vm, "text", text);
      },
      async recall(vm) {
        return recall(vm, "text");
      },
      async ticks(vm) {
        const ticks = Number(recall(vm, "ticks")) + 1;
        remember(vm, "ticks", String(ticks));
        return ticks;
      },
      async crash(vm) {
        vmm.crash(vm.record.pid, { reason: "guest_crashed", message: "Kernel panic - not syncing" });
      },
      async shutDown(vm) {
        vmm.crash(vm.record.pid, { reason: "guest_shutdown", message: "the guest shut down" });
      },
    },
    async [Symbol.asyncDispose]() {
      await vmm.close();
      rmSync(dir, { recursive: true, force: true });
    },
  };
  return bed;
});
