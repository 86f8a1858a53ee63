/** Hosts: made by people, registered and kept alive by their agents. */
import { isIPv4 } from "node:net";
import { RookeryError } from "@rookery/protocol/errors";
import type { Queryable } from "../db/database.ts";
import {
  type HostScope,
  type HostWithCount,
  findHost,
  insertHost,
  listHosts as listRows,
} from "../db/hosts.ts";
import type { HostId } from "../model/ids.ts";
import type { Deps } from "./deps.ts";
import { demandPlatform } from "./errors.ts";
import type {
  Caller,
  HeartbeatInput,
  HeldKey,
  Host,
  HostInvitation,
  Page,
  RegisterHostInput,
  Registration,
} from "./services.ts";

export async function createHost(
  deps: Deps,
  caller: Caller,
  input: { name: string; type: "shared" | "byoc"; labels: Record<string, string> },
  held?: HeldKey<HostInvitation>,
): Promise<HostInvitation> {
  if (input.type === "shared") demandPlatform(caller, "A shared host");
  const id = deps.ids.host();
  return deps.db.transaction().execute(async (tx) => {
    await insertHost(tx, { ...input, id, teamId: input.type === "byoc" ? caller.teamId : undefined });
    const made = await invite(deps, tx, caller, id);
    await held?.complete(tx, id, made);
    return made;
  });
}

/** For a host that never registered, is silent or was revoked: one at work keeps its credentials. */
export async function newRegistrationToken(deps: Deps, caller: Caller, id: HostId): Promise<HostInvitation> {
  const { status } = await getHost(deps, caller, id);
  if (status !== "pending" && status !== "unreachable") {
    throw new RookeryError("wrong_state", `The host is ${status}: it has registered already.`, {
      details: { status },
    });
  }
  return invite(deps, deps.db, caller, id);
}

export async function getHost({ db }: { db: Queryable }, caller: Caller, id: HostId): Promise<Host> {
  const host = await findHost(db, scopeOf(caller), id);
  if (!host) throw noHost();
  return shown(host);
}

export async function listHosts(
  deps: Deps,
  caller: Caller,
  page: { limit: number; cursor?: string },
): Promise<Page<Host>> {
  const { items, nextCursor } = await listRows(deps.db, scopeOf(caller), page);
  return { items: items.map(shown), nextCursor };
}

export async function registerHost(deps: Deps, input: RegisterHostInput): Promise<Registration> {
  const { token, proof, ...facts } = input;
  assertAddress(input);
  const { hostId, accessToken, refreshToken } = await deps.credentials.register(token, facts, proof);
  deps.log.info({ host: hostId, version: input.version }, "a host registered");
  deps.onHostSeen();
  const { id: clusterId, publicKey: controlPlaneKey } = deps.cluster;
  return { hostId, clusterId, accessToken, refreshToken, controlPlaneKey };
}

export async function heartbeat(
  deps: Deps,
  accessToken: string,
  id: HostId,
  input: HeartbeatInput,
): Promise<{ acknowledgedEvent: bigint }> {
  const { load, digest, eventLogId, snapshots } = input;
  const { acknowledgedEvent, wasSilent } = await deps.credentials.heartbeat(accessToken, id, {
    load,
    digest,
    eventLogId,
    snapshots,
  });
  if (wasSilent) {
    deps.log.info({ host: id }, "a host is online, or online again");
    deps.onHostSeen();
  }
  return { acknowledgedEvent };
}

export const noHost = (): RookeryError => new RookeryError("not_found", "There is no such host.");

export function scopeOf(caller: Caller): HostScope {
  return caller.role === "platform" ? "all" : { teamId: caller.teamId };
}

async function invite(deps: Deps, db: Queryable, caller: Caller, id: HostId): Promise<HostInvitation> {
  const { token, expiresAt } = await deps.credentials.newRegistrationToken(db, id);
  return { host: await getHost({ db }, caller, id), registrationToken: token, expiresAt };
}

function shown(host: HostWithCount): Host {
  const { draining, status, ...facts } = host;
  return { ...facts, status: draining && status === "online" ? "draining" : status };
}

/** HOST:PORT. Without a certificate to pin, our tokens would cross a network in the clear. */
function assertAddress({ address, certificateFingerprint }: RegisterHostInput): void {
  const [, bracketed, plain, port] =
    /^(?:\[([0-9a-fA-F:.]+)\]|([A-Za-z0-9.-]{1,253})):(\d{1,5})$/.exec(address) ?? [];
  const host = bracketed ?? plain;
  if (host === undefined || Number(port) < 1 || Number(port) > 65_535) {
    throw invalidAddress("must be HOST:PORT");
  }
  const isLoopback = host === "localhost" || host === "::1" || (isIPv4(host) && host.startsWith("127."));
  if (certificateFingerprint === undefined && !isLoopback) {
    throw invalidAddress("must be on loopback, or certificate_fingerprint be given");
  }
}

function invalidAddress(reason: string): RookeryError {
  return new RookeryError("invalid_request", `address ${reason}`, { details: { field: "address", reason } });
}
