/**
 * What /init told envd about this guest, and whether it may serve yet.
 *
 *   awaiting-init ─▶ initialising ─▶ ready
 *                        ▲             │   (a new restore)
 *                        └─────────────┘
 *
 * Invariant: there are settings only in `ready`, so nobody is served with the
 * token or the environment of the sandbox whose memory this guest began with.
 */
import { createHash, timingSafeEqual } from "node:crypto";

export interface Settings {
  readonly accessToken: string;
  readonly envVars: Readonly<Record<string, string>>;
  readonly defaultUser: string;
  readonly defaultWorkdir: string | undefined;
}

export class GuestState {
  #settings: Settings | undefined;

  /** Undefined unless `ready`. */
  get settings(): Settings | undefined {
    return this.#settings;
  }

  close(): void {
    this.#settings = undefined;
  }

  open(settings: Settings): void {
    this.#settings = settings;
  }

  /** Compares in constant time; without settings no token is right. */
  isAccessToken(token: string | undefined): boolean {
    if (this.#settings === undefined || token === undefined) return false;
    return equalSecrets(token, this.#settings.accessToken);
  }
}

export function equalSecrets(a: string, b: string): boolean {
  return timingSafeEqual(sha256(a), sha256(b));
}

function sha256(text: string): Buffer {
  return createHash("sha256").update(text).digest();
}
