/** Content codings of file bodies: gzip or none (RFC 9110 §12.5.3). */
import { HttpError } from "../errors.ts";

export type Encoding = "gzip" | "identity";

/** The coding that a request's body has. */
export function parseContentEncoding(header: string | undefined): Encoding {
  const name = (header ?? "").split(";", 1)[0]!.trim().toLowerCase();
  if (name === "" || name === "identity") return "identity";
  if (name === "gzip") return "gzip";
  throw new HttpError(400, `unsupported Content-Encoding: ${header}, supported: [gzip]`);
}

/** The coding to answer with; 406 when the client refuses all that we have. */
export function negotiateEncoding(header: string | undefined): Encoding {
  if (header === undefined || header.trim() === "") return "identity";
  const wanted = header
    .split(",")
    .map(parseQuality)
    .sort((a, b) => b.quality - a.quality);
  const identityRefused = wanted.some(({ name, quality }) => name === "identity" && quality === 0);
  for (const { name, quality } of wanted) {
    if (quality === 0) continue;
    if (name === "gzip") return "gzip";
    if (name === "identity") return "identity";
    if (name === "*") return identityRefused ? "gzip" : "identity";
  }
  if (!identityRefused) return "identity";
  throw new HttpError(406, "no acceptable encoding found, supported: [gzip]");
}

function parseQuality(item: string): { name: string; quality: number } {
  const [name, ...parameters] = item.split(";").map((part) => part.trim().toLowerCase());
  const weight = parameters.find((parameter) => parameter.startsWith("q="));
  const quality = weight === undefined ? 1 : Number(weight.slice(2));
  return { name: name!, quality: Number.isNaN(quality) ? 1 : quality };
}
