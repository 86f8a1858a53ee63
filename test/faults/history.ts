/** What callers did and were told in a run. */
export interface CreateRecord {
  tag: string;
  key: string | undefined;
  body: unknown;
  /** Ids that its answers named. */
  ids: Set<string>;
}

export class History {
  readonly creates: CreateRecord[] = [];
  /** Sandboxes that callers know, in the order that they heard of them. */
  readonly sandboxes: string[] = [];
  readonly snapshots: string[] = [];
  /** Their destruction was accepted. */
  readonly destroyed = new Set<string>();
  /** By sandbox: what its guest said that it wrote down. */
  readonly written = new Map<string, Set<string>>();
  /** Answers that no fault excuses. */
  readonly wrongAnswers: { what: string; request: string; answer: string }[] = [];
  answers = 0;
  unanswered = 0;
  /** Calls without an answer after all faults had ended: asked again, and no fault excuses them. */
  hangs = 0;

  knows(id: string): void {
    if (!this.sandboxes.includes(id)) this.sandboxes.push(id);
  }
}
