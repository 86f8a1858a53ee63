/** SandboxOperations in memory, for tests of the border: remembers what it was asked. */
import { RookeryError } from "@rookery/protocol/errors";
import type { EnvdTarget, HostEvent, SandboxOperations, SandboxView } from "../../sandbox-manager/sandbox.ts";

export interface FakeOperations extends SandboxOperations {
  calls: { name: string; args: unknown[] }[];
  sandboxes: Map<string, SandboxView>;
  hostEvents: HostEvent[];
  /** Uses of envd under way. */
  uses: number;
  vm: AbortController;
  envd: EnvdTarget | undefined;
  /** What reviving the guest does; nothing unless set. */
  revive: (() => Promise<boolean>) | undefined;
}

export function fakeOperations(): FakeOperations {
  const calls: FakeOperations["calls"] = [];
  const sandboxes = new Map<string, SandboxView>();
  const hostEvents: HostEvent[] = [];
  const called = (name: string, ...args: unknown[]): void => void calls.push({ name, args });
  const find = (id: string): SandboxView => {
    const view = sandboxes.get(id);
    if (view === undefined) throw new RookeryError("not_found", "No such sandbox");
    return view;
  };
  return {
    calls,
    sandboxes,
    hostEvents,
    uses: 0,
    vm: new AbortController(),
    envd: undefined,
    revive: undefined,
    async create(spec, operation) {
      called("create", spec, operation);
      const { id, vcpus, memoryMb, diskMb, lifetime } = spec;
      const view: SandboxView = {
        id,
        phase: "running",
        inMemory: false,
        generation: operation.generation,
        vcpus,
        memoryMb,
        diskMb,
        lifetime,
        expiresAtUnixMs: 1_700_000_000_000.5,
        startedAtUnixMs: 1_600_000_000_000,
        diskUsedBytes: 4096,
      };
      sandboxes.set(id, view);
      return view;
    },
    async destroy(operation) {
      called("destroy", operation);
      sandboxes.delete(operation.sandboxId);
    },
    async pause(operation) {
      called("pause", operation);
      const view: SandboxView = { ...find(operation.sandboxId), phase: "paused" };
      sandboxes.set(view.id, view);
      return view;
    },
    async resume(operation, lifetime) {
      called("resume", operation, lifetime);
      const { phase } = find(operation.sandboxId);
      if (phase !== "paused") {
        throw new RookeryError("wrong_state", "The sandbox is not paused", {
          details: { status: phase, tries: 2 },
        });
      }
      return find(operation.sandboxId);
    },
    async update(id, lifetime) {
      called("update", id, lifetime);
      return find(id);
    },
    async ping(id) {
      find(id);
      return 0;
    },
    async get(id) {
      called("get", id);
      return find(id);
    },
    async list(options) {
      called("list", options);
      return { items: [...sandboxes.values()], more: false };
    },
    async createSnapshot(operation, snapshotId, teamId) {
      called("createSnapshot", operation, snapshotId, teamId);
      return { snapshotId, vcpus: 1, memoryMb: 512, diskMb: 4096, sizeBytes: 123 };
    },
    getSnapshots(ids) {
      called("getSnapshots", ids);
      return ids.map((snapshotId) => ({
        ...{ snapshotId, vcpus: 1, memoryMb: 512, diskMb: 4096, sizeBytes: 123 },
        ...(snapshotId.endsWith("stored") && { storeId: "store-1" }),
      }));
    },
    async deleteSnapshot(snapshotId) {
      called("deleteSnapshot", snapshotId);
      throw new Error("cannot unlink /var/lib/secret");
    },
    async freeze(id) {
      called("freeze", id);
      const view: SandboxView = { ...find(id), phase: "paused", inMemory: true, strangerForMs: 0 };
      sandboxes.set(id, view);
      return view;
    },
    async thaw(id) {
      called("thaw", id);
      const { strangerForMs: _since, ...rest } = find(id);
      const view: SandboxView = { ...rest, phase: "running", inMemory: false };
      sandboxes.set(id, view);
      return view;
    },
    async withEnvd(id, use) {
      if (find(id).phase !== "running" || this.envd === undefined) {
        throw new RookeryError("wrong_state", "The sandbox does not run", {
          details: { status: find(id).phase },
        });
      }
      this.uses += 1;
      try {
        return await use(this.envd, this.vm.signal);
      } finally {
        this.uses -= 1;
      }
    },
    async reviveGuest(id) {
      called("reviveGuest", id);
      return this.revive?.() ?? false;
    },
    events: {
      logId: "log-1",
      get lastNumber() {
        return hostEvents.at(-1)?.number ?? 0n;
      },
      async *read({ after, follow, signal }) {
        for (const event of hostEvents) if (event.number > after) yield event;
        if (follow && !signal.aborted) {
          await new Promise((resolve) => signal.addEventListener("abort", resolve, { once: true }));
        }
      },
      async acknowledge(logId, number) {
        called("acknowledge", logId, number);
      },
    },
  };
}
