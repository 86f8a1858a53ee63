/**
 * The life of a program that shares our process: when it ends, it ends in the
 * middle of whatever it was at, as by a SIGKILL.
 *
 * Every effect of such a program goes through its life. An effect under way when
 * it ends is completed (the kernel does not stop half-way either), but nobody
 * hears of it, and no other one begins: what waits, waits for ever. So the
 * program's memory is lost, and what it left in the world is what another finds.
 */
import { AsyncLocalStorage } from "node:async_hooks";
import { setTimeout as sleep } from "node:timers/promises";

/** For effects that are not guarded one by one, such as a `mkdir` between two guarded ones. */
const GRACE_MS = 15;

type Effect = (...args: unknown[]) => unknown;

export class Life {
  #isOver = false;
  readonly #ending = Promise.withResolvers<never>();
  #underWay = 0;
  /** What an effect does itself is a part of it. */
  readonly #inside = new AsyncLocalStorage<true>();
  readonly signal: AbortSignal;
  readonly #controller = new AbortController();

  constructor() {
    this.signal = this.#controller.signal;
    this.#ending.promise.catch(() => undefined);
  }

  get isOver(): boolean {
    return this.#isOver;
  }

  /** Returns when nothing of it has an effect any more. */
  async end(): Promise<void> {
    if (!this.#isOver) {
      this.#isOver = true;
      const ended = new Error("the program ended");
      this.#ending.reject(ended);
      this.#controller.abort(ended);
    }
    do await sleep(GRACE_MS);
    while (this.#underWay > 0);
  }

  /** For those outside who wait for it: rejects when it ends. */
  async orEnd<T>(work: Promise<T>): Promise<T> {
    return await Promise.race([work, this.#ending.promise]);
  }

  /** For its own waits: what comes after its end it never hears. */
  async hear<T>(work: Promise<T>): Promise<T> {
    try {
      const result = await work;
      return this.#isOver ? await never() : result;
    } catch (cause) {
      if (this.#isOver) return await never();
      throw cause;
    }
  }

  async through<T>(effect: () => T | Promise<T>): Promise<T> {
    if (this.#inside.getStore() === true) return await effect();
    if (this.#isOver) return await never();
    return await this.hear(this.#count(effect));
  }

  async #count<T>(effect: () => T | Promise<T>): Promise<T> {
    this.#underWay += 1;
    try {
      return await this.#inside.run(true, async () => await effect());
    } finally {
      this.#underWay -= 1;
    }
  }

  /** What the kernel does for it after its end, such as closing its files. */
  async afterwards(work: () => Promise<unknown>): Promise<void> {
    await this.#inside.run(true, work);
  }

  /** The same object, whose async methods are effects from now on; `before` may fail them. */
  guard<T extends object>(object: T, before: (method: string) => void | Promise<void> = () => undefined): T {
    for (const name of methodsOf(object)) {
      const method: unknown = Reflect.get(object, name);
      if (typeof method !== "function" || method.constructor.name !== "AsyncFunction") continue;
      // oxlint-disable-next-line typescript/no-unsafe-type-assertion -- looked at in the line above
      const effect = method.bind(object) as Effect;
      Reflect.set(object, name, (...args: unknown[]) =>
        this.through(async () => {
          await before(name);
          return await effect(...args);
        }),
      );
    }
    return object;
  }
}

export function never(): Promise<never> {
  return new Promise<never>(() => undefined);
}

function methodsOf(object: object): string[] {
  const names = new Set<string>();
  for (
    let at: object | null = object;
    at !== null && at !== Object.prototype;
    at = Reflect.getPrototypeOf(at)
  ) {
    for (const name of Object.getOwnPropertyNames(at)) {
      if (name !== "constructor" && typeof Object.getOwnPropertyDescriptor(at, name)?.value === "function")
        names.add(name);
    }
  }
  return [...names];
}
