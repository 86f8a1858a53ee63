/**
 * Commands to one host of which the network keeps a copy: a connection that was
 * given up and yet delivers, a message that was sent twice. A copy arrives
 * whenever a newer command for its sandbox was carried out, so that an agent
 * that does not compare generations has every chance to obey it.
 */
import { fromBinary } from "@bufbuild/protobuf";
import { PauseSandboxRequestSchema } from "@rookery/protocol/hostagent";

const COMMANDS = /\/(Create|Pause|Resume|Destroy)Sandbox$|\/CreateSnapshot$/;
/** What may be obeyed although a newer one was: the others find what they were to make, or nothing. */
const REPEATABLE = /\/(Pause|Resume)Sandbox$/;
/** Arrivals of one copy. */
const MAX_ARRIVALS = 4;

interface Copy {
  generation: bigint;
  deliver: () => Promise<unknown>;
  arrivals: number;
}

export class LateCommands {
  readonly #copies = new Map<string, Copy[]>();
  readonly #arriving = new Set<Promise<unknown>>();
  #toKeep = 0;
  #toLose = 0;

  /**
   * Until it has kept `keep` that change a sandbox's state; the first `lose` of
   * all do not arrive when they should.
   */
  begin({ keep, lose }: { keep: number; lose: number }): void {
    this.#toKeep = keep;
    this.#toLose = lose;
  }

  /** Keeps a copy of a command, if one is wanted. True: this one is lost for now. */
  keep(url: string, body: Uint8Array, deliver: () => Promise<unknown>): boolean {
    if (this.#toKeep === 0 || !COMMANDS.test(url)) return false;
    if (REPEATABLE.test(url)) this.#toKeep -= 1;
    // In every command that is the first field.
    const { operation } = fromBinary(PauseSandboxRequestSchema, body);
    if (operation === undefined) return false;
    const { sandboxId, generation } = operation;
    const copies = this.#copies.get(sandboxId) ?? [];
    this.#copies.set(sandboxId, [...copies, { generation, deliver, arrivals: 0 }]);
    if (this.#toLose === 0) return false;
    this.#toLose -= 1;
    return true;
  }

  /** A command of this generation was carried out: what is older arrives now. */
  arriveAfter(sandboxId: string, generation: bigint): void {
    for (const copy of this.#copies.get(sandboxId) ?? []) {
      if (copy.generation >= generation || copy.arrivals === MAX_ARRIVALS) continue;
      copy.arrivals += 1;
      const arriving = copy
        .deliver()
        .catch(() => undefined)
        .finally(() => this.#arriving.delete(arriving));
      this.#arriving.add(arriving);
    }
  }

  async end(): Promise<void> {
    this.begin({ keep: 0, lose: 0 });
    this.#copies.clear();
    await Promise.all(this.#arriving);
  }
}
