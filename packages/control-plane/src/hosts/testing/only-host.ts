/** For tests of the loops over hosts: a control plane that has one host, and nothing else to do. */
import assert from "node:assert/strict";
import { findSandbox, type SandboxRecord } from "../../db/sandboxes.ts";
import type { SandboxId } from "../../model/ids.ts";
import type { Caller } from "../../service/services.ts";
import {
  DEFAULTS,
  LOAD,
  type TestHost,
  type TestPlane,
  useTestPlane,
} from "../../service/testing/test-plane.ts";
import type { FakeAgent } from "./fake-agent.ts";

export interface OnlyHost {
  plane: TestPlane;
  host: TestHost;
  caller: Caller;
  create(this: void): Promise<SandboxId>;
  rowOf(this: void, id: SandboxId): Promise<SandboxRecord>;
  /** What the agent has of it. */
  fakeOf(this: void, id: SandboxId): NonNullable<ReturnType<FakeAgent["sandboxes"]["get"]>>;
  beat(this: void): ReturnType<TestPlane["services"]["heartbeat"]>;
}

/** Opens a plane for each call; the tests of a file share its database. */
export function useOnlyHost(): () => Promise<OnlyHost> {
  const openPlane = useTestPlane();
  return async () => {
    const plane = await openPlane();
    const { db } = plane.deps;
    await db
      .updateTable("hosts")
      .set({ draining: true, next_check_at: new Date("2100-01-01") })
      .execute();
    await db
      .updateTable("cluster")
      .set({ receptive_since: new Date(0), receptive_at: new Date() })
      .execute();
    const host = await plane.newHost();
    const caller = await plane.newCaller();
    return {
      plane,
      host,
      caller,
      create: async () => (await plane.services.createSandbox(caller, DEFAULTS)).id,
      rowOf: async (id) => {
        const row = await findSandbox(db, caller.teamId, id);
        assert.ok(row);
        return row;
      },
      fakeOf: (id) => {
        const fake = host.agent.sandboxes.get(id);
        assert.ok(fake);
        return fake;
      },
      beat: () =>
        plane.services.heartbeat(host.accessToken, host.id, {
          load: LOAD,
          digest: "d",
          eventLogId: host.agent.logId,
          lastEventNumber: 0n,
        }),
    };
  };
}
