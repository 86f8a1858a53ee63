/**
 * The database of one run, and ways to lose it: connections that break, and a
 * server that takes no new ones.
 */
import { observeRows } from "../observe-rows.ts";
import type { Observed } from "../world.ts";
import { Connections } from "./backends.ts";
import type { Databases, LentDatabase } from "./databases.ts";

export class RunDatabase implements AsyncDisposable {
  readonly #databases: Databases;
  readonly #lent: LentDatabase;
  readonly #programs = new Set<Connections>();
  #isAway = false;

  private constructor(databases: Databases, lent: LentDatabase) {
    this.#databases = databases;
    this.#lent = lent;
  }

  static async take(databases: Databases): Promise<RunDatabase> {
    return new RunDatabase(databases, await databases.take());
  }

  get url(): string {
    return this.#lent.url;
  }

  /** For one incarnation of a replica. */
  connections(): Connections {
    const connections = new Connections(this.#lent.backends);
    connections.isRefused = this.#isAway;
    this.#programs.add(connections);
    return connections;
  }

  /** A replica died: nothing of it reaches the server any more. */
  async cutOff(connections: Connections): Promise<void> {
    this.#programs.delete(connections);
    connections.isRefused = true;
    await connections.sever();
  }

  async breakConnections(): Promise<void> {
    await Promise.all([...this.#programs].map((connections) => connections.sever()));
  }

  async goAway(): Promise<void> {
    this.#isAway = true;
    for (const connections of this.#programs) connections.isRefused = true;
    await this.breakConnections();
  }

  comeBack(): void {
    this.#isAway = false;
    for (const connections of this.#programs) connections.isRefused = false;
  }

  async observe(): Promise<Omit<Observed, "machines">> {
    return await observeRows((text) => this.#lent.observer.ask(text));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await Promise.all([...this.#programs].map((connections) => this.cutOff(connections)));
    await this.#databases.giveBack(this.#lent);
  }
}
