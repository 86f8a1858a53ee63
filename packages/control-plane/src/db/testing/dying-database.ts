/**
 * A database that one replica loses for good, at a statement that the test
 * chooses: for whoever else looks, as if the replica had been killed there. A
 * transaction under way is rolled back, as PostgreSQL does when a client is gone.
 */
import type { KyselyPlugin, PluginTransformQueryArgs, PluginTransformResultArgs } from "kysely";
import type { Database } from "../database.ts";

export class DyingDatabase implements KyselyPlugin {
  readonly db: Database;
  #left: number;
  #isDead = false;

  /** The statement after `statements` others is not executed any more. */
  constructor(db: Database, statements: number) {
    this.#left = statements;
    this.db = Object.assign(db.withPlugin(this), { news: db.news });
  }

  kill(): void {
    this.#isDead = true;
  }

  get isDead(): boolean {
    return this.#isDead;
  }

  transformQuery({ node }: PluginTransformQueryArgs) {
    this.#isDead ||= this.#left-- === 0;
    if (this.#isDead) throw new Error("the test killed this replica");
    return node;
  }

  async transformResult({ result }: PluginTransformResultArgs) {
    return result;
  }
}
