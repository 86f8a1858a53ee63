/**
 * A vitest reporter that keeps what its JSON report leaves out: errors outside
 * of any test (a worker that died, a rejection nobody awaited, a teardown that
 * threw). Writes an array of strings to the file that ROOKERY_UNHANDLED_ERRORS
 * names.
 */
import { writeFileSync } from "node:fs";

export default class UnhandledErrorsReporter {
  /** @param {readonly unknown[]} _modules @param {readonly {name?: string, message?: string, stack?: string}[]} errors */
  onTestRunEnd(_modules, errors) {
    const file = process.env["ROOKERY_UNHANDLED_ERRORS"];
    if (file)
      writeFileSync(
        file,
        JSON.stringify(errors.map((error) => error.stack ?? error.message ?? "an error without a message")),
      );
  }
}
