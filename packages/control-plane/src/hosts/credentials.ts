/**
 * Credentials of hosts: registration by a one-time token, access by a token of
 * days, renewal by a rotating refresh token.
 *
 * The rule of rotation: a refresh token stays good until one that it was
 * exchanged for is first shown. Shown again before that, the answer was lost
 * and it gets a fresh successor; shown after, or after another successor of the
 * same parent was, two hold the same line: theft, and all the host's tokens end.
 * No clock decides, so whichever line a crash
 * strikes, on either side, the host holds a token that works.
 */
import { RookeryError } from "@rookery/protocol/errors";
import type { Database, Queryable } from "../db/database.ts";
import {
  consumeRegistrationToken,
  deleteRefreshTokens,
  insertRefreshToken,
  lockRefreshToken,
  markRefreshTokenUsed,
  pruneSuccessors,
  putRegistrationToken,
} from "../db/host-tokens.ts";
import { type HostEnd, endOfHost } from "../db/host-end.ts";
import {
  type Heartbeat,
  type HostFacts,
  raiseHostEpoch,
  recordHeartbeat,
  recordRegistration,
} from "../db/hosts.ts";
import type { HostId } from "../model/ids.ts";
import type { Random } from "../model/new-ids.ts";
import type { Cluster } from "./cluster.ts";
import { hashToken, signEndHost, signHostAccess, verifyHostAccess } from "./tokens.ts";

export interface CredentialOptions {
  registrationMs: number;
  accessMs: number;
  refreshMs: number;
}

/** Unused successors that one token may have: more are answers that nobody got. */
const MAX_SUCCESSORS = 8;

interface Deps {
  db: Database;
  cluster: Cluster;
  random: Random;
  now: () => number;
  options: CredentialOptions;
}

export interface HostTokens {
  accessToken: string;
  refreshToken: string;
}

export class HostCredentials {
  readonly #deps: Deps;

  constructor(deps: Deps) {
    this.#deps = deps;
  }

  /** Replaces the one before; kept as a hash only. */
  async newRegistrationToken(db: Queryable, id: HostId): Promise<{ token: string; expiresAt: Date }> {
    const token = this.#newToken("rkreg_");
    const { registrationMs } = this.#deps.options;
    return { token, expiresAt: await putRegistrationToken(db, id, hashToken(token), registrationMs) };
  }

  /** The token is consumed and the host made one in the same transaction. */
  async register(token: string, facts: HostFacts): Promise<HostTokens & { hostId: HostId }> {
    const { db, options } = this.#deps;
    const refreshToken = this.#newToken("rkref_");
    const host = await db.transaction().execute(async (tx) => {
      const id = await consumeRegistrationToken(tx, hashToken(token));
      const registered = id && (await recordRegistration(tx, id, facts));
      if (!registered) {
        throw new RookeryError("invalid_token", "The registration token is unknown, used or expired.");
      }
      await deleteRefreshTokens(tx, id, "all");
      await insertRefreshToken(tx, {
        hash: hashToken(refreshToken),
        hostId: id,
        validMs: options.refreshMs,
      });
      return { id, epoch: registered.epoch };
    });
    return { hostId: host.id, refreshToken, accessToken: await this.#access(host) };
  }

  async refresh(token: string): Promise<HostTokens> {
    const refreshToken = this.#newToken("rkref_");
    const host = await this.#deps.db.transaction().execute(async (tx) => {
      const shown = await lockRefreshToken(tx, hashToken(token));
      if (!shown || shown.isExpired) return undefined;
      if (shown.hostEnd) throw await this.#endedHost(shown.hostId, shown.hostEnd);
      if (shown.isOutrun) {
        // Committed, not thrown: a rollback would leave the thief his token.
        await deleteRefreshTokens(tx, shown.hostId, "all");
        await raiseHostEpoch(tx, shown.hostId);
        return undefined;
      }
      await insertRefreshToken(tx, {
        hash: hashToken(refreshToken),
        hostId: shown.hostId,
        parent: shown.hash,
        validMs: this.#deps.options.refreshMs,
      });
      await markRefreshTokenUsed(tx, shown.hash);
      await pruneSuccessors(tx, shown.hash, MAX_SUCCESSORS);
      await deleteRefreshTokens(tx, shown.hostId, "expired");
      return { id: shown.hostId, epoch: shown.epoch };
    });
    if (!host) throw new RookeryError("invalid_token", "The refresh token is unknown, used or expired.");
    return { refreshToken, accessToken: await this.#access(host) };
  }

  /** Proof and effect in one statement: the epoch is compared where the row is written. */
  async heartbeat(
    accessToken: string,
    id: HostId,
    heartbeat: Heartbeat,
  ): Promise<{ acknowledgedEvent: bigint; wasSilent: boolean }> {
    const { db, cluster, now } = this.#deps;
    const proof = await verifyHostAccess(cluster, accessToken, now());
    if (proof.id !== id) throw new RookeryError("forbidden", "The access token is another host's.");
    const answer = await recordHeartbeat(db, id, proof.epoch, heartbeat);
    if (answer) return answer;
    const end = await endOfHost(db, id);
    throw end
      ? await this.#endedHost(id, end)
      : new RookeryError("invalid_token", "The access token is good no more.");
  }

  #access(host: { id: HostId; epoch: number }): Promise<string> {
    const { cluster, options, now } = this.#deps;
    return signHostAccess(cluster, host, { validMs: options.accessMs, nowMs: now() });
  }

  #newToken(prefix: string): string {
    return `${prefix}${Buffer.from(this.#deps.random(32)).toString("hex")}`;
  }

  /**
   * Said only to who proved to be that host: its agent tells by it what to do
   * with what it has. It destroys nothing without our signature below it.
   */
  async #endedHost(id: HostId, reason: HostEnd): Promise<RookeryError> {
    const { cluster, now } = this.#deps;
    if (reason === "host_revoked") {
      return new RookeryError("invalid_token", "This host's credentials were revoked.", {
        details: { reason },
      });
    }
    const proof = await signEndHost(cluster, id, now());
    return new RookeryError("invalid_token", "This host was deleted.", { details: { reason, proof } });
  }
}
