/**
 * Credentials of hosts: registration by a one-time token, access by a token of
 * days, renewal by a rotating refresh token.
 *
 * The rule of rotation: a refresh token stays good until one that it was
 * exchanged for, or the access token beside that, is first used. Shown again
 * before that, the answer was lost and it gets a fresh successor; shown after,
 * or after another successor of the same parent was used, two hold the same
 * line: theft, and all the host's tokens end. An agent uses its new access token
 * at once, so the old line is closed within a moment. A registration token
 * likewise: spent, it is good once more for the key that it was spent with,
 * until something of what it gave is used. No clock decides, so whichever line a
 * crash strikes, on either side, the host holds a token that works.
 */
import { RookeryError } from "@rookery/protocol/errors";
import type { Reach } from "@rookery/protocol/failpoints";
import type { Database, Queryable } from "../db/database.ts";
import {
  deleteRefreshTokens,
  findUnheardRegistration,
  insertRefreshToken,
  lockRefreshToken,
  markRefreshTokenUsed,
  pruneSuccessors,
  putRegistrationToken,
  spendRegistrationToken,
} from "../db/host-tokens.ts";
import { type HostEnd, endOfHost } from "../db/host-end.ts";
import {
  type Heartbeat,
  type HostFacts,
  type HostProof,
  raiseHostEpoch,
  recordHeartbeat,
  recordRegistration,
} from "../db/hosts.ts";
import type { HostId } from "../model/ids.ts";
import type { Random } from "../model/new-ids.ts";
import type { Cluster } from "./cluster.ts";
import { hashToken, provesRegistrant, signEndHost, signHostAccess, verifyHostAccess } from "./tokens.ts";

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
  /** Failpoint, by its name (failpoints.ts). */
  reach?: Reach;
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

  /**
   * The token is spent and the host made one in the same transaction. `proof`,
   * of the agent's own key, makes a spent one good for it again (see above).
   */
  async register(token: string, facts: HostFacts, proof?: string): Promise<HostTokens & { hostId: HostId }> {
    const { db, options } = this.#deps;
    const refreshToken = this.#newToken("rkref_");
    const refreshHash = hashToken(refreshToken);
    const host = await db.transaction().execute(async (tx) => {
      const step = this.#steps("register-host");
      const id =
        (await step("spend-token", () => spendRegistrationToken(tx, hashToken(token)))) ??
        (await this.#heldRegistration(tx, token, facts, proof));
      const registered = id && (await step("record-host", () => recordRegistration(tx, id, facts)));
      if (!registered) {
        throw new RookeryError("invalid_token", "The registration token is unknown, used or expired.");
      }
      await step("end-old-tokens", () => deleteRefreshTokens(tx, id, "all"));
      await step("store-token", () =>
        insertRefreshToken(tx, { hash: refreshHash, hostId: id, validMs: options.refreshMs }),
      );
      await this.#reach("register-host.commit.before");
      return { id, epoch: registered.epoch, refreshHash };
    });
    await this.#reach("register-host.commit.after");
    return { hostId: host.id, refreshToken, accessToken: await this.#access(host) };
  }

  /** Of the agent that spent the token, and did not get or keep the answer. */
  async #heldRegistration(
    tx: Queryable,
    token: string,
    { publicKey }: HostFacts,
    proof: string | undefined,
  ): Promise<HostId | undefined> {
    if (proof === undefined || !(await provesRegistrant(proof, publicKey, token))) return undefined;
    return findUnheardRegistration(tx, hashToken(token), publicKey);
  }

  async refresh(token: string): Promise<HostTokens> {
    const { db, options } = this.#deps;
    const refreshToken = this.#newToken("rkref_");
    const refreshHash = hashToken(refreshToken);
    const host = await db.transaction().execute(async (tx) => {
      const shown = await lockRefreshToken(tx, hashToken(token));
      if (!shown || shown.isExpired) return undefined;
      if (shown.hostEnd) throw await this.#endedHost(shown.hostId, shown.hostEnd);
      if (shown.isOutrun) {
        await this.#endFamily(tx, shown.hostId);
        return "theft";
      }
      const step = this.#steps("refresh-host");
      await step("store-successor", () =>
        insertRefreshToken(tx, {
          hash: refreshHash,
          hostId: shown.hostId,
          parent: shown.hash,
          validMs: options.refreshMs,
        }),
      );
      await step("mark-used", () => markRefreshTokenUsed(tx, shown.hash, options.refreshMs));
      await step("prune", async () => {
        await pruneSuccessors(tx, shown.hash, MAX_SUCCESSORS);
        await deleteRefreshTokens(tx, shown.hostId, "expired");
      });
      await this.#reach("refresh-host.commit.before");
      return { id: shown.hostId, epoch: shown.epoch, refreshHash };
    });
    if (host === "theft") await this.#reach("end-family.commit.after");
    if (!host || host === "theft") {
      throw new RookeryError("invalid_token", "The refresh token is unknown, used or expired.");
    }
    await this.#reach("refresh-host.commit.after");
    return { refreshToken, accessToken: await this.#access(host) };
  }

  /** To be committed, whatever is answered: a rollback would leave the thief his token. */
  async #endFamily(tx: Queryable, id: HostId): Promise<void> {
    const step = this.#steps("end-family");
    await step("delete-tokens", () => deleteRefreshTokens(tx, id, "all"));
    await step("raise-epoch", () => raiseHostEpoch(tx, id));
    await this.#reach("end-family.commit.before");
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
    const step = this.#steps("heartbeat-host");
    const answer = await step("record", () => recordHeartbeat(db, id, proof, heartbeat));
    if (answer) return answer;
    const end = await endOfHost(db, id);
    throw end
      ? await this.#endedHost(id, end)
      : new RookeryError("invalid_token", "The access token is good no more.");
  }

  #access(host: { id: HostId } & HostProof): Promise<string> {
    const { cluster, options, now } = this.#deps;
    return signHostAccess(cluster, host, { validMs: options.accessMs, nowMs: now() });
  }

  async #reach(name: string): Promise<void> {
    await this.#deps.reach?.(name);
  }

  /** Work with a failpoint before and one after it. */
  #steps(operation: string) {
    return async <T>(name: string, work: () => Promise<T>): Promise<T> => {
      await this.#reach(`${operation}.${name}.before`);
      const done = await work();
      await this.#reach(`${operation}.${name}.after`);
      return done;
    };
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
