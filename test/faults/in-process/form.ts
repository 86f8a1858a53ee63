/** This form of the suite, opened once for any number of runs. */
import type { World } from "../world.ts";
import { openSharedApi } from "./api.ts";
import { Databases, type Server } from "./databases.ts";
import { InProcessWorld, type WorldOptions } from "./in-process-world.ts";

/** For a server of its own: nothing of it has to survive, and its connections are many and short. */
export const SERVER_SETTINGS = {
  max_connections: "400",
  fsync: "off",
  synchronous_commit: "off",
  full_page_writes: "off",
  wal_level: "minimal",
  max_wal_senders: "0",
  jit: "off",
  plan_cache_mode: "force_generic_plan",
};

export interface InProcessForm extends AsyncDisposable {
  openWorld(parts: Omit<WorldOptions, "databases" | "api">): Promise<World>;
}

export async function openInProcess(server: Server): Promise<InProcessForm> {
  const databases = new Databases(server);
  const api = await openSharedApi();
  return {
    openWorld: (parts) => InProcessWorld.open({ ...parts, databases, api }),
    [Symbol.asyncDispose]: async () => {
      await api.app.close();
      await databases[Symbol.asyncDispose]();
    },
  };
}
