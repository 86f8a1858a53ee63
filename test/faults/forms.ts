/** The two forms of the suite, opened for any number of seeds. */
import { startTestServer } from "../../packages/control-plane/src/db/testing/test-server.ts";
import { SERVER_SETTINGS, openInProcess } from "./in-process/form.ts";
import type { Log } from "./in-process/log.ts";
import type { Random } from "./random.ts";
import { enclosureRoot } from "./real-processes/enclosure.ts";
import { RealWorld } from "./real-processes/real-world.ts";
import { openWorkshop } from "./real-processes/workshop.ts";
import type { Schedule } from "./schedule.ts";
import type { World } from "./world.ts";

export interface Form extends AsyncDisposable {
  /** `slot`: below the number of runs at once, and no other run's. */
  openWorld(parts: { schedule: Schedule; random: Random; log: Log }, slot: number): Promise<World>;
}

export async function openForm(kind: "in-process" | "processes", parallel: number): Promise<Form> {
  await using opened = new AsyncDisposableStack();
  if (kind === "processes") {
    const root = enclosureRoot();
    if (root === undefined) throw new Error("real processes live in an enclosure");
    const workshop = await openWorkshop(root, parallel);
    return {
      openWorld: (parts, slot) => RealWorld.open({ ...parts, workshop, slot }),
      // All that it made goes with the enclosure.
      [Symbol.asyncDispose]: () => Promise.resolve(),
    };
  }
  const server = await startTestServer(SERVER_SETTINGS);
  opened.defer(() => server.stop());
  const form = opened.use(await openInProcess(server));
  const resources = opened.move();
  return {
    openWorld: (parts) => form.openWorld(parts),
    [Symbol.asyncDispose]: () => resources.disposeAsync(),
  };
}
