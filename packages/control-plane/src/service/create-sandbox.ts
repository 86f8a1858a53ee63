/**
 * Makes a sandbox: a row that says which host is at it, then the host.
 *
 * A host that has no room, or does not answer, is passed over for the next one;
 * what a silent host may have made all the same, the monitor ends there, since
 * the row names another. Any other failure is the sandbox's end, shown in its
 * row and to the caller.
 */
import { RookeryError } from "@rookery/protocol/errors";
import { type Queryable, tellNews } from "../db/database.ts";
import type { HostRecord } from "../db/hosts.ts";
import { type SandboxRecord, findSandboxes, insertSandbox, moveSandbox } from "../db/sandboxes.ts";
import { recordSnapshotCopy } from "../db/snapshot-copies.ts";
import { teamQuota } from "../db/teams.ts";
import type { HostAgent } from "../hosts/host-agent.ts";
import { agentOf, releaseVm, settleSandbox } from "../hosts/settle.ts";
import type { HostId, SandboxId, SnapshotId, TeamId } from "../model/ids.ts";
import type { Sandbox } from "../model/sandbox.ts";
import { awaitMade } from "./await-made.ts";
import type { Deps } from "./deps.ts";
import { shownError, silentHost, wrongState } from "./errors.ts";
import { holdRow } from "./hold-row.ts";
import type { KnownHosts } from "./known-hosts.ts";
import { type Origin, chooseShape, resolveTemplate } from "./resolve-template.ts";
import type { Caller, CreateSandboxInput, HeldKey } from "./services.ts";

export async function createSandbox(
  deps: Deps,
  knownHosts: KnownHosts,
  caller: Caller,
  input: CreateSandboxInput,
  held?: HeldKey<Sandbox>,
): Promise<SandboxRecord> {
  // oxlint-disable-next-line typescript/no-unsafe-type-assertion -- what this same use case bound the key to
  const before = held?.resourceId && (await awaitMade(deps, caller, held.resourceId as SandboxId));
  if (before) return before;
  const [origin, known] = await Promise.all([
    resolveTemplate(deps, caller.teamId, input.template),
    knownHosts.schedulable(caller.teamId),
  ]);
  const order = { ...input, ...chooseShape(origin, input), origin, teamId: caller.teamId };
  const passedOver = new Set<HostId>();
  let row: SandboxRecord | undefined;
  let refusal = new RookeryError("no_capacity", "No host can take this sandbox now.");
  for (let hosts = known; ; hosts = await knownHosts.readAnew(caller.teamId)) {
    const host = pickHost(deps, order, hosts, passedOver);
    if (!host) {
      if (hosts === known) continue;
      break;
    }
    passedOver.add(host.id);
    const placed: SandboxRecord | undefined = row
      ? await moveSandbox(deps.db, row, "assign", { hostId: host.id, deadlineMs: deps.options.leaseMs })
      : await insert(deps, order, host.id, held);
    if (!placed) {
      // That host takes none any more, or the row was destroyed meanwhile.
      if (row) await assertUnmoved(deps, row);
      continue;
    }
    const outcome = await makeOn(deps, host, placed, order.origin);
    if (outcome.kind === "made") return outcome.row;
    refusal = outcome.refusal;
    row = await moveSandbox(deps.db, placed, "refused", { hostId: null, deadlineMs: deps.options.leaseMs });
    if (!row) throw await movedAway(deps, placed);
  }
  if (row) await moveSandbox(deps.db, row, "died", { error: shownError(refusal) });
  throw refusal;
}

interface Order extends CreateSandboxInput {
  teamId: TeamId;
  origin: Origin;
  vcpus: number;
  memoryMb: number;
  diskMb: number;
}

function pickHost(
  { scheduler }: Deps,
  order: Order,
  hosts: readonly HostRecord[],
  passedOver: ReadonlySet<HostId>,
): HostRecord | undefined {
  const { memoryMb, diskMb, origin } = order;
  return scheduler.pick(
    { memoryMb, diskMb, snapshot: origin.snapshot },
    hosts.filter(({ id }) => !passedOver.has(id)),
  );
}

/** Undefined: the host takes no sandboxes any more. */
async function insert(
  deps: Deps,
  order: Order,
  hostId: HostId,
  held: HeldKey<Sandbox> | undefined,
): Promise<SandboxRecord | undefined> {
  const row = await (held
    ? deps.db.transaction().execute(async (tx) => {
        const inserted = await insertInto(tx, deps, order, hostId);
        if (inserted) await held.bind(tx, inserted.id);
        return inserted;
      })
    : insertInto(deps.db, deps, order, hostId));
  if (row && held) tellNews(deps.db, row.teamId);
  if (row) return row;
  const { maxSandboxesPerTeam } = deps.options;
  const quota = await teamQuota(deps.db, order.teamId);
  const max = quota?.max ?? maxSandboxesPerTeam;
  if (!quota || quota.live < max) return undefined;
  throw new RookeryError("quota_exceeded", `The team has ${quota.live} sandboxes, of at most ${max}.`, {
    details: { max_sandboxes: max },
  });
}

function insertInto(
  db: Queryable,
  { ids, options }: Deps,
  order: Order,
  hostId: HostId,
): Promise<SandboxRecord | undefined> {
  return insertSandbox(
    db,
    {
      id: ids.sandbox(),
      teamId: order.teamId,
      template: order.origin.name,
      snapshotId: order.origin.snapshot?.id,
      hostId,
      vcpus: order.vcpus,
      memoryMb: order.memoryMb,
      diskMb: order.diskMb,
      timeoutSec: order.timeoutSec,
      onTimeout: order.onTimeout,
      timeoutMode: order.timeoutMode,
      env: order.env,
      metadata: order.metadata,
      deadlineMs: options.leaseMs,
    },
    { defaultQuota: options.maxSandboxesPerTeam },
  );
}

type Outcome = { kind: "made"; row: SandboxRecord } | { kind: "refused"; refusal: RookeryError };

const REFUSALS: ReadonlySet<string> = new Set(["no_capacity", "out_of_disk", "host_unreachable"]);

async function makeOn(deps: Deps, host: HostRecord, row: SandboxRecord, origin: Origin): Promise<Outcome> {
  let agent: HostAgent | undefined;
  try {
    agent = agentOf(deps.pool, host);
    if (!agent) throw silentHost();
    const seen = await holdRow(deps, row, create(deps, agent, row, origin));
    const settled = await settleSandbox(deps, agent, row, seen);
    if (settled.kind === "settled") return { kind: "made", row: settled.row };
  } catch (cause) {
    if (cause instanceof RookeryError && REFUSALS.has(cause.code)) return { kind: "refused", refusal: cause };
    const ended = await moveSandbox(deps.db, row, "died", { error: shownError(cause) });
    if (ended) {
      if (agent) await releaseVm(deps, agent, ended);
      throw cause;
    }
  }
  throw await movedAway(deps, row);
}

const create = (deps: Deps, agent: HostAgent, row: SandboxRecord, origin: Origin) => async () => {
  const { snapshot } = origin;
  // Before the host may fetch it, so that a deletion finds all that have it.
  if (snapshot && row.hostId && !snapshot.hostIds.includes(row.hostId)) {
    const isThere = await recordSnapshotCopy(deps.db, snapshot.id, row.hostId);
    if (!isThere) throw new RookeryError("template_not_found", "The snapshot was deleted meanwhile.");
  }
  return await agent.createSandbox(operationOf(deps, row), specOf(deps, row, origin));
};

export function operationOf({ clock, options }: Deps, { id, generation }: SandboxRecord) {
  return { sandboxId: id, generation, deadline: new Date(clock.now() + options.createMs) };
}

export function specOf(
  { cluster }: Deps,
  row: SandboxRecord,
  { name, snapshot }: { name: string; snapshot?: { id: SnapshotId } },
) {
  const { vcpus, memoryMb, diskMb, timeoutSec, onTimeout, timeoutMode, env, teamId } = row;
  return {
    source: snapshot ? { kind: "snapshot" as const, id: snapshot.id } : { kind: "image" as const, name },
    envdAccessToken: cluster.envdAccessToken(row),
    ...{ vcpus, memoryMb, diskMb, timeoutSec, onTimeout, timeoutMode, env, teamId },
  };
}

async function assertUnmoved(deps: Deps, row: SandboxRecord): Promise<void> {
  const [now] = await findSandboxes(deps.db, [row.id]);
  if (now?.generation !== row.generation) throw await movedAway(deps, row);
}

/** Another call got at the row while its host was at it. */
async function movedAway({ db }: Deps, { id, status }: SandboxRecord): Promise<RookeryError> {
  const [now] = await findSandboxes(db, [id]);
  return wrongState(now?.status ?? status, "it was ended while it started");
}
