/**
 * Watches what an agent accepts: once a command of one generation was carried
 * out, none of an older one may be, however late it arrives. The monitor would
 * mend what such a command does, so that at the end of a run nothing shows.
 */
import type {
  Operation,
  SandboxOperations,
} from "../../../packages/host-agent/src/sandbox-manager/sandbox.ts";

export class GenerationWatch {
  readonly violations: string[] = [];
  readonly #newest = new Map<string, bigint>();
  readonly #onDone: (sandboxId: string, generation: bigint) => void;

  /** `onDone`: whenever one was carried out. */
  constructor(onDone: (sandboxId: string, generation: bigint) => void) {
    this.#onDone = onDone;
  }

  /** The same operations, watched. */
  around(operations: SandboxOperations): SandboxOperations {
    const note = ({ sandboxId, generation }: Operation): void => {
      if (generation > (this.#newest.get(sandboxId) ?? 0n)) this.#newest.set(sandboxId, generation);
      this.#onDone(sandboxId, generation);
    };
    const watched = <A extends unknown[], R>(
      what: string,
      operation: Operation,
      work: (...args: A) => Promise<R>,
    ) => {
      const { sandboxId: id, generation } = operation;
      return async (...args: A): Promise<R> => {
        const before = this.#newest.get(id) ?? 0n;
        const result = await work(...args);
        if (generation < before) this.violations.push(`${what} of ${id}: ${generation} after ${before}`);
        note(operation);
        return result;
      };
    };
    return new Proxy(operations, {
      get(target, name) {
        if (name === "create") {
          return (spec: Parameters<SandboxOperations["create"]>[0], operation: Operation) =>
            watched("create", operation, () => target.create(spec, operation))();
        }
        if (name === "destroy") {
          return async (operation: Operation): Promise<void> => {
            // Of any generation: what is gone is gone.
            await target.destroy(operation);
            note(operation);
          };
        }
        if (name === "pause")
          return (operation: Operation) => watched("pause", operation, () => target.pause(operation))();
        if (name === "resume") {
          return (operation: Operation, lifetime: Parameters<SandboxOperations["resume"]>[1]) =>
            watched("resume", operation, () => target.resume(operation, lifetime))();
        }
        const value: unknown = Reflect.get(target, name, target);
        return typeof value === "function" ? value.bind(target) : value;
      },
    });
  }
}
