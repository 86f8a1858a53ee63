/** Watches credentials pass, and notes what should not have been good. */
import { z } from "zod";
import type { ApiAnswer } from "../world.ts";

const refreshed = z.object({ refresh_token: z.string() });

interface Token {
  name: string;
  successors: Set<string>;
  /** It was shown and accepted, and that exchange is over. */
  wasUsed: boolean;
}

export class CredentialWatch {
  readonly violations: string[] = [];
  /** Per token, the keys of those who registered with it. */
  readonly #registrations = new Map<string, Set<string>>();
  readonly #tokens = new Map<string, Token>();

  /** Around an exchange at a replica. */
  async refresh(shown: string, exchange: () => Promise<ApiAnswer>): Promise<ApiAnswer> {
    const token = this.#token(shown);
    const wasOutrun = [...token.successors].some((next) => this.#token(next).wasUsed);
    const answer = await exchange();
    if (answer.status !== 200) return answer;
    if (wasOutrun) this.violations.push(`${token.name} after its successor`);
    token.wasUsed = true;
    token.successors.add(refreshed.parse(answer.body).refresh_token);
    return answer;
  }

  /** Whoever did not get the answer may ask again, with the same key. */
  async register(
    { token, public_key: key }: { token: string; public_key: string },
    exchange: () => Promise<ApiAnswer>,
  ): Promise<ApiAnswer> {
    const answer = await exchange();
    if (answer.status > 299) return answer;
    const keys = (this.#registrations.get(token) ?? new Set()).add(key);
    this.#registrations.set(token, keys);
    if (keys.size > 1) this.violations.push(`a registration token, by ${keys.size} agents`);
    return answer;
  }

  #token(text: string): Token {
    const known = this.#tokens.get(text) ?? {
      name: `refresh token ${this.#tokens.size + 1}`,
      successors: new Set<string>(),
      wasUsed: false,
    };
    this.#tokens.set(text, known);
    return known;
  }
}
