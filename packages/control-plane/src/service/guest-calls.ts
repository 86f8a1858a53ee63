/**
 * Calls into a running guest: exec, files, ping. The hot path: where a sandbox
 * runs is known for a few seconds after it was looked up, so most calls cost
 * nothing but the call to the host. That it still runs, the host says: when it
 * does not, our row is settled and the caller told what is true.
 */
import { RookeryError } from "@rookery/protocol/errors";
import { type SandboxRecord, findSandbox, findSandboxTarget } from "../db/sandboxes.ts";
import type { HostAgent } from "../hosts/host-agent.ts";
import { settleSandbox } from "../hosts/settle.ts";
import type { HostEndpoint } from "../db/hosts.ts";
import type { SandboxId } from "../model/ids.ts";
import type { Deps } from "./deps.ts";
import { noSandbox, silentHost, wrongState } from "./errors.ts";
import { Recent } from "./recent.ts";
import type { Caller, ExecInput, ExecResult, Services } from "./services.ts";

const WANTED = "it has to be running";

export class GuestCalls implements Pick<Services, "exec" | "writeFile" | "readFile" | "pingSandbox"> {
  readonly #deps: Deps;
  /** Where sandboxes run, by team and id: only ever those that did. */
  readonly #known: Recent<HostEndpoint>;

  constructor(deps: Deps) {
    this.#deps = deps;
    const { cacheMs: forMs, cacheSize: size } = deps.options;
    this.#known = new Recent({ size, forMs, now: () => deps.clock.now() });
  }

  exec(caller: Caller, id: SandboxId, input: ExecInput, signal: AbortSignal): Promise<ExecResult> {
    const { timeoutSec, ...command } = input;
    const timeoutMs = Math.ceil(timeoutSec * 1000);
    return this.#withGuest(caller, id, (agent) => agent.exec(id, { ...command, timeoutMs }, signal));
  }

  writeFile(
    caller: Caller,
    id: SandboxId,
    path: string,
    content: AsyncIterable<Uint8Array>,
    signal: AbortSignal,
  ): Promise<void> {
    const call = (agent: HostAgent) => agent.writeFile(id, path, content, signal);
    // What was read of `content` is gone.
    return this.#withGuest(caller, id, call, { repeatable: false });
  }

  readFile(
    caller: Caller,
    id: SandboxId,
    path: string,
    signal: AbortSignal,
  ): Promise<{ sizeBytes?: number | undefined; content: AsyncIterable<Uint8Array> }> {
    return this.#withGuest(caller, id, (agent) => agent.readFile(id, path, signal));
  }

  async pingSandbox(caller: Caller, id: SandboxId): Promise<void> {
    await this.#withGuest(caller, id, (agent) => agent.pingSandbox(id));
  }

  async #withGuest<T>(
    caller: Caller,
    id: SandboxId,
    call: (agent: HostAgent) => Promise<T>,
    { repeatable }: { repeatable: boolean } = { repeatable: true },
  ): Promise<T> {
    const key = `${caller.teamId} ${id}`;
    let host = this.#known.get(key);
    if (!host) {
      host = await this.#locate(caller, id);
      this.#known.set(key, host);
    }
    const agent = this.#deps.pool.agent(host);
    try {
      return await call(agent);
    } catch (cause) {
      if (!(cause instanceof RookeryError)) throw cause;
      if (cause.code === "host_unreachable") this.#known.delete(key);
      if (cause.code !== "wrong_state" && cause.code !== "not_found") throw cause;
      this.#known.delete(key);
      const row = await findSandbox(this.#deps.db, caller.teamId, id);
      if (row?.status !== "running" || row.hostId === host.id) throw await this.#explain(row, agent, cause);
      // It was resumed on another host since we looked; the former one did nothing.
      if (repeatable) return await this.#withGuest(caller, id, call, { repeatable: false });
      throw new RookeryError("unavailable", "The sandbox has just moved to another host; try again.");
    }
  }

  async #locate({ teamId }: Caller, id: SandboxId): Promise<HostEndpoint> {
    const target = await findSandboxTarget(this.#deps.db, teamId, id);
    if (!target) throw noSandbox();
    if (target.status === "missing") throw silentHost();
    if (target.status !== "running" || !target.host) throw wrongState(target.status, WANTED);
    return target.host;
  }

  async #explain(
    row: SandboxRecord | undefined,
    agent: HostAgent,
    cause: RookeryError,
  ): Promise<RookeryError> {
    if (!row) return noSandbox();
    if (row.status !== "running") return wrongState(row.status, WANTED);
    const settled = await settleSandbox(this.#deps, agent, row, await agent.getSandbox(row.id));
    return settled.kind === "settled" && settled.row.status !== "running"
      ? wrongState(settled.row.status, WANTED)
      : cause;
  }
}
