/** What was learnt lately: a bounded map whose entries end by time. The oldest go first when there are too many. */
export class Recent<T> {
  readonly #options: { size: number; forMs: number; now: () => number };
  readonly #entries = new Map<string, { value: T; until: number }>();

  constructor(options: { size: number; forMs: number; now: () => number }) {
    this.#options = options;
  }

  get(key: string): T | undefined {
    const entry = this.#entries.get(key);
    if (!entry) return undefined;
    if (this.#options.now() < entry.until) return entry.value;
    this.#entries.delete(key);
    return undefined;
  }

  set(key: string, value: T): void {
    const { size, forMs, now } = this.#options;
    this.#entries.delete(key);
    this.#entries.set(key, { value, until: now() + forMs });
    if (this.#entries.size <= size) return;
    const [oldest] = this.#entries.keys();
    if (oldest !== undefined) this.#entries.delete(oldest);
  }

  delete(key: string): void {
    this.#entries.delete(key);
  }

  deleteWhere(isUnwanted: (value: T) => boolean): void {
    for (const [key, { value }] of this.#entries) if (isUnwanted(value)) this.#entries.delete(key);
  }
}
