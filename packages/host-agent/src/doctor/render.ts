/** A diagnosis as text for a terminal. */
import { styleText } from "node:util";
import type { Diagnosis, Verdict } from "./doctor.ts";

const COLORS = { works: "green", limited: "yellow", fails: "red" } as const satisfies Record<Verdict, string>;

export function renderDiagnosis(diagnosis: Diagnosis, options: { color: boolean }): string {
  const rows = diagnosis.findings.map(
    ({ area, name, verdict, detail }) => [area, name, verdict, detail] as const,
  );
  const width = (column: 0 | 1 | 2): number => Math.max(...rows.map((row) => row[column].length), 0);
  const [areas, names, verdicts] = [width(0), width(1), width(2)];
  const lines = rows.map(([area, name, verdict, detail]) => {
    const word = verdict.padEnd(verdicts);
    const shown = options.color ? styleText(COLORS[verdict], word, { validateStream: false }) : word;
    return `${area.padEnd(areas)}  ${name.padEnd(names)}  ${shown}  ${detail.replaceAll("\n", " ")}`;
  });
  return [...lines, "", ...diagnosis.advice, diagnosis.ok ? "Sandboxes can run here." : ""]
    .filter((line, index, all) => line !== "" || index < all.length - 1)
    .join("\n")
    .concat("\n");
}
